"""OpenAI's forms of requests and answers: reading a body, making the objects of its answer.

    fields       a body's keys, taken one by one; what is left over is refused
    bodies       chat completions and completions
    responses    the newer form of chat
    embeddings   vectors of texts
    answers      completions, their chunks, logprobs and usage
    errors       the error object

Knows JSON values. Does not know HTTP, files, tokens or the engine.
"""
