"""The engine's commands, one module each: functions of a list of arguments that return an exit code.

They import at the top only what their help needs: neither torch nor the rest of the engine.
"""
