"""`shoal bench`: what this machine can do, measured: the exchange of a round, codecs, tensor links, the disk."""
