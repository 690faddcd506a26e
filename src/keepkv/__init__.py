"""keepkv: KV-cache compression with real memory freed, and a receipt."""
