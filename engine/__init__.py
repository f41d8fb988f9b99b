"""The inference engine. `engine.scheduling` is plain Python and is shared with the planner's simulator."""
