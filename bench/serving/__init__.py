"""``accel bench serve``: load on servers that speak OpenAI's protocol, and what `vllm bench serve` reports of it.

``client`` asks one server, ``stream`` reads its events, ``load`` decides when, ``figures`` and ``scrape`` say what came
of it, ``session`` carries a plan out, ``report`` shows it.
"""
