"""The engine: search space, supernet, training with shrinking, evaluation, release and export."""

import os

# Before torch loads its OpenMP: threads that wait by spinning make two jobs on the same cores ten times slower
# (4.8 s against 0.23 s a training step, seen on 2 cores at a load of 7).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
