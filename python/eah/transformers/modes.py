"""What the steps after a prompt may do with its head. This module loads nothing: command lines name the modes."""

NOTES = {  # of each mode, what a report says of it
    "off": (),
    "hold": ("the head chosen at prefill keeps lending its map to later tokens",),
    "track": ("the table is of the prefill; each later token takes part in the statistics and has a head chosen anew",),
}
MODES = tuple(NOTES)
