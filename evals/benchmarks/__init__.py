"""Time and memory, each in turns with what it is compared with."""
