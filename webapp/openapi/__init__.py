"""The description of the API: what views say of themselves, and the OpenAPI document that comes of it."""
