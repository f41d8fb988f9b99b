"""Plan LLM serving: catalog, memory, step time, workload, simulation, search, export and the command line."""
