"""The HTTP server: an API process in front of an engine process.

    config          every setting of the server; the flags are made from it
    protocol        the messages between the two processes
    engine_process  the engine in a loop
    engine_client   the engine as the API process sees it: start, generate, abort, restart
    answering       prompts -> token ids -> engine -> pieces of text
    completions, responses, native   what the routes do: OpenAI's forms, SGLang's
    files, batches  what is kept in a folder (records), and its life; batch_rows: the answer to a line; batch_routes
    app             the other routes; guard: keys, limits, request ids
    metrics, traces figures for Prometheus and page.html; spans for OpenTelemetry
    serve           start, signals, drain

Nothing here unpickles: messages are msgpack (a test looks for it).
"""
