"""From Python and in notebooks: `tsae.train`, `tsae.evaluate`, `tsae.open`, and what they return."""
