"""The KV cache: which layers share pages (`groups`), the pages (`cache`), attention over them (`attention`)."""
