"""Answers that are JSON of a given schema: each token is chosen among those that lead to such an answer.

    generate(model, processor, image="photo.jpg", prompt="List the animals.", schema={
        "type": "object",
        "properties": {"animals": {"type": "array", "items": {"type": "string"}}},
        "required": ["animals"],
    })

It needs the extra `structured` (`pip install 'fastvlm-mlx[structured]'`), which installs llguidance. A schema is a JSON
schema (draft 2020-12) as a dict, a class with `model_json_schema`, as pydantic's have it, or `"json"` for any object.

The answer is compact JSON: no spaces or line breaks between tokens, so a model cannot lose itself in them. Properties
come in the order of the schema. A small model would also go on for ever in strings, lists and numbers, so what a
schema leaves open has bounds here; every answer is still one that the schema allows:

| left open | bound |
|---|---|
| the length of a string | 512 characters |
| the number of items of a list | 32, or those of `prefixItems` |
| the properties of an object | those that the schema names; without any, 32 with keys of 1 to 64 characters |
| the size of a number | ±(2**53 − 1), with six decimals if it need not be whole |
| the type of a value | what its other keywords are about; without any, any JSON three levels deep |
| a schema within itself | five levels |

`maxLength`, `maxItems`, `maxProperties`, `minimum`, `maximum`, `multipleOf` and `additionalProperties` in the schema
take their place; only `additionalProperties: true` does not, where properties are named. `max_tokens` still ends an
answer: its `finish_reason` is `length` then, and its text is no JSON.

What cannot be ensured is refused by its name before any work: `not`, `if`, `contains`, `uniqueItems`,
`propertyNames`, `dependentRequired` and the `unevaluated…`, a `oneOf` whose parts may overlap, a `$ref` to another
document, which is never fetched, look-around and back-references in a `pattern`, an unknown `format`, and every keyword
that no draft has, as it may be misspelt. Annotations such as `title` and `description`, and keys that begin with `x-`,
mean nothing here: describe the fields in the prompt, for the model does not see the schema. A name that the schema
leaves open may come twice in one object.

`schemas` reads and checks, `narrowing` sets the bounds (by `keywords`, `references` and `unions`), `grammar` turns the
result into masks for the tokens.
"""
