"""The commands of this room: `memwall calibrate` and `memwall validate`."""
