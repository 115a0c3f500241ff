"""Templates of the model cards that `vamba.hub` writes; a package only so that they can be found once installed."""
