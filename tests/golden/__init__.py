"""Files that earlier versions of edgepet wrote: they are read for ever after, and written with equal bytes."""
