"""Devices: the mesh, how arrays are sharded over it, the hardware, and several processes."""
