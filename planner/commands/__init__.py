"""The planner's commands, one module each. They import at the top only what `memwall --help` needs."""
