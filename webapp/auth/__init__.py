"""Who may call: from the token of a request to the tenant and the scopes behind it."""
