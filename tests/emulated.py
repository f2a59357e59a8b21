REASON = "not built"
