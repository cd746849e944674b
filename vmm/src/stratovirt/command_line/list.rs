//! Property lists, `virtio-blk-device,drive=rootfs,id=blk0`, read by serde.
//!
//! A struct is read from `key=value` items, where a key alone means `on`; the first item may leave its key out. An enum
//! is read from a first item that names the variant and the rest as the variant's struct. So a type is the whole
//! grammar of an option, and [`super::fields`] can ask the type for it.
//!
//! `,,` is a comma in a value.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::support::{self, Support};

/// Most properties of one list: more than any option has, so that a longer one is a mistake.
pub const MAX_ITEMS: usize = 64;

/// What is wrong with a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Nothing, or nothing between two commas.
    #[error("A property is empty")]
    Empty,
    /// More than [`MAX_ITEMS`] properties.
    #[error("It has more than {MAX_ITEMS} properties")]
    TooLong,
    /// A property that is needed.
    #[error("The property {0} is missing")]
    Missing(&'static str),
    /// A property that stands there twice.
    #[error("The property {0} is given twice")]
    Twice(String),
    /// A property that nobody knows.
    #[error("There is no property {name}, there are {}", known.join(", "))]
    Unknown {
        /// The property.
        name: String,
        /// Those that there are.
        known: &'static [&'static str],
    },
    /// A value that is none of the words that are possible.
    #[error("{value:?} is not known here, there are {}", known.join(", "))]
    Word {
        /// The value.
        value: String,
        /// What it could be.
        known: &'static [&'static str],
    },
    /// A value that cannot be.
    #[error("The property {key} cannot be {value:?}: {why}")]
    Value {
        /// The property.
        key: String,
        /// Its value.
        value: String,
        /// Why not.
        why: String,
    },
    /// A property or kind that is known and refused.
    #[error("{what} is not for this machine: {why}")]
    Refused {
        /// What.
        what: String,
        /// The sentence of the table.
        why: &'static str,
    },
    /// Anything else, as a sentence.
    #[error("{0}")]
    Other(String),
}

impl serde::de::Error for ListError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self::Other(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::Unknown { name: field.into(), known: expected }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::Word { value: variant.into(), known: expected }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::Twice(field.into())
    }
}

/// Reads the value of `option`. The first item may be the value of the property `first`.
pub fn parse<T: DeserializeOwned>(option: &'static str, first: Option<&str>, text: &str) -> Result<T, ListError> {
    T::deserialize(List { option, kind: None, first, items: split(text)? })
}

/// The items between single commas.
fn split(text: &str) -> Result<Vec<String>, ListError> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            items.push(String::new());
            continue;
        }
        if let Some(item) = items.last_mut() {
            item.push(character);
        }
    }
    if items.len() > MAX_ITEMS {
        return Err(ListError::TooLong);
    }
    if items.iter().any(String::is_empty) {
        return Err(ListError::Empty);
    }
    Ok(items)
}

struct List<'a> {
    option: &'static str,
    /// The variant, once it is known.
    kind: Option<String>,
    first: Option<&'a str>,
    items: Vec<String>,
}

impl List<'_> {
    /// Keys and values, without those that have no effect.
    fn into_pairs(self) -> Result<Vec<(String, String)>, ListError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            let (key, value) = match (item.split_once('='), self.first) {
                (Some((key, value)), _) => (key, value),
                (None, Some(first)) if index == 0 => (first, item.as_str()),
                (None, _) => (item.as_str(), "on"),
            };
            let refused = |why| ListError::Refused { what: format!("The property {key}={value}"), why };
            match support::of_property(self.option, self.kind.as_deref(), key) {
                Support::Refused(why) => return Err(refused(why)),
                Support::Only { values, why } if !values.contains(&value) => return Err(refused(why)),
                Support::Only { .. } | Support::Ignored(_) => {}
                Support::Compatible | Support::Extended(_) | Support::Partly(_) => {
                    if pairs.iter().any(|(known, _)| known == key) {
                        return Err(ListError::Twice(key.into()));
                    }
                    pairs.push((key.into(), value.into()));
                }
            }
        }
        Ok(pairs)
    }
}

impl<'de> Deserializer<'de> for List<'_> {
    type Error = ListError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_map(Pairs { pairs: self.into_pairs()?.into_iter(), value: None })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ListError> {
        let kind = self.items.remove(0);
        if let Support::Refused(why) = support::of_kind(self.option, &kind) {
            return Err(ListError::Refused { what: kind, why });
        }
        self.kind = Some(kind);
        visitor.visit_enum(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> EnumAccess<'de> for List<'_> {
    type Error = ListError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), ListError> {
        let kind = self.kind.as_deref().unwrap_or_default();
        let name: StrDeserializer<ListError> = kind.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for List<'_> {
    type Error = ListError;

    fn unit_variant(self) -> Result<(), ListError> {
        match self.items.first() {
            None => Ok(()),
            Some(item) => Err(ListError::Unknown { name: item.clone(), known: &[] }),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, ListError> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, ListError> {
        Err(ListError::custom("A kind has its properties in one struct"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value, ListError> {
        self.deserialize_any(visitor)
    }
}

struct Pairs {
    pairs: std::vec::IntoIter<(String, String)>,
    value: Option<Value>,
}

impl<'de> MapAccess<'de> for Pairs {
    type Error = ListError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ListError> {
        let Some((key, text)) = self.pairs.next() else { return Ok(None) };
        let name: StrDeserializer<ListError> = key.as_str().into_deserializer();
        let name = seed.deserialize(name)?;
        self.value = Some(Value { key, text });
        Ok(Some(name))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ListError> {
        let value = self.value.take().ok_or(ListError::Empty)?;
        let (key, text) = (value.key.clone(), value.text.clone());
        // The types of values know neither their name nor their text.
        seed.deserialize(value).map_err(|error| match error {
            ListError::Other(why) => ListError::Value { key, value: text, why },
            ListError::Word { value, known } => {
                ListError::Value { key, value, why: format!("there are {}", known.join(", ")) }
            }
            other => other,
        })
    }
}

struct Value {
    key: String,
    text: String,
}

impl Value {
    /// Decimal, or hexadecimal after `0x`.
    fn number(&self) -> Result<u64, ListError> {
        let number = match self.text.strip_prefix("0x").or_else(|| self.text.strip_prefix("0X")) {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => self.text.parse(),
        };
        number.map_err(|_| ListError::custom("it is not a number"))
    }
}

impl<'de> Deserializer<'de> for Value {
    type Error = ListError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_string(self.text)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        match self.text.as_str() {
            "on" | "true" | "yes" => visitor.visit_bool(true),
            "off" | "false" | "no" => visitor.visit_bool(false),
            _ => Err(ListError::custom("it is on or off")),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_u64(self.number()?)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_newtype_struct(self)
    }

    /// `4:5:6`
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        let mut parts: Vec<_> = self.text.split(':').map(str::to_owned).collect();
        parts.reverse();
        visitor.visit_seq(Parts { key: self.key, parts })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ListError> {
        visitor.visit_enum(self.text.into_deserializer())
    }

    forward_to_deserialize_any! {
        i8 i16 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct
        identifier ignored_any
    }
}

struct Parts {
    key: String,
    /// Last first.
    parts: Vec<String>,
}

impl<'de> SeqAccess<'de> for Parts {
    type Error = ListError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ListError> {
        let Some(text) = self.parts.pop() else { return Ok(None) };
        seed.deserialize(Value { key: self.key.clone(), text }).map(Some)
    }
}
