"""Search spaces that come with the program."""

from engine.space import Cluster, Space


def imagenet_space(classes: int = 1000) -> Space:
    """Table 1 of the paper: 19 blocks, 3^6 x 6^19 architectures of 199.96 M to 773.40 M MACs."""
    kernels, expansions = (3, 5, 7), (3, 6)

    def cluster(blocks: int, channels: tuple[int, ...], stride: int) -> Cluster:
        return Cluster(
            blocks=blocks, kernels=kernels, expansions=expansions, channels=channels, stride=stride
        )

    return Space(
        classes=classes,
        clusters=(
            cluster(2, (24, 32, 40), 2),
            cluster(4, (40, 48, 56), 2),
            cluster(4, (64, 72, 80), 2),
            cluster(4, (96, 112, 128), 1),
            cluster(4, (160, 192, 224), 2),
            cluster(1, (240, 280, 320), 1),
        ),
    )


def mobilenet_v2_space(classes: int = 1000) -> Space:
    """MobileNetV2 1.0 as a space of one architecture: 300.8 M MACs, 3.50 M parameters."""
    table = ((2, 24, 2), (3, 32, 2), (4, 64, 2), (3, 96, 1), (3, 160, 2), (1, 320, 1))
    return Space(
        classes=classes,
        clusters=tuple(
            Cluster(blocks=blocks, kernels=(3,), expansions=(6,), channels=(channels,), stride=stride)
            for blocks, channels, stride in table
        ),
    )
