"""Training, tuning and serving seen by Prometheus and Grafana, without ray: what is measured, dashboards, alert rules, ``rafce monitor``.

``rafce_ray.telemetry`` publishes the metrics of training and tuning through Ray. Logs are JSON lines beside them: a run's and a
trial's ``events.jsonl`` (:meth:`rafce_ray.run_folder.RunFolder.add_event`), the endpoint's log (``rafce_ray.service.logs``).
"""
