"""Named queries, one question a file; `actstore queries` lists them, `actstore.named` reads them."""
