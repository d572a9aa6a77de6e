"""What a request pays for passing through a gateway: Galley, LiteLLM and Portkey beside a direct call."""
