"""`vamba bench`: a model measured on this machine against the length of the video, beside its floor and a peer."""

GIB = 2**30
