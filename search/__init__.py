"""From measured operator times to a plan, and to a whole step, in seven rooms.

    measure    times operators and keeps the times: profiles and their files
    model      plays orders of operators by those times: seconds, memory, a whole step
    solve      finds the best order of each pair of layers
    recompute  finds what layers make again, so that a stage fits into memory
    pipeline   plays the stages of a pipeline, whose visits are such steps
    cluster    predicts a step on a cluster from the profile of one device
    report     shows what was found: tables, traces, pictures, folders

A room imports only from the rooms above it in this list, and what others need of a room is
exported by its `__init__.py`. Only pictures, and pages with them, need matplotlib, so `report` does
not export them: import `report.pictures`, `report.pipeline_pictures` and `report.page` where
something is drawn.
"""
