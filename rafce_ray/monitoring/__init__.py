"""Metrics of training, tuning and serving without Ray: their names and meanings, dashboards, alert rules, ``rafce
monitor``.

``rafce_ray.train.worker`` publishes the metrics of training and tuning through Ray. Runs and trials also log JSON lines
to ``events.jsonl`` (:meth:`rafce_ray.run.folder.RunFolder.add_event`), the endpoint to its own log
(``rafce_ray.service.edge``).
"""
