"""From measured operator times to a plan: profile, cost model, solver, simulator, reports."""
