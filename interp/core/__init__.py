"""The engine: sites, hooks, interventions, runs, and what everything above shares."""
