"""The only package that touches the world: sockets, disks, clocks, processes, terminals."""
