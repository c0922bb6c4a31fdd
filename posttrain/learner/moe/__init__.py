"""Everything that knows about routers: finding them, replaying recorded routes, and balancing experts."""
