"""One decoder for every model family: `families` says what differs, `config` reads config.json, `decoder` computes."""
