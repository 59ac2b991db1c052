"""The process and its machine: files that appear whole, errors of users, the console, signals, ranks."""
