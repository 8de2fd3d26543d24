"""Where requests and tokens go: gates, expert sets, and the dispatch of tokens to the expert groups."""
