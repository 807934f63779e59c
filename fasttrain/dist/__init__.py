"""The distributed floor: process groups and the collectives on them."""
