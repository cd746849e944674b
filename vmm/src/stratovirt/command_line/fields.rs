//! Asks the types of the options which properties and kinds they have: what the table of the documentation is made of.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

/// What a type reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// Properties.
    Fields(&'static [&'static str]),
    /// A kind, and then its properties.
    Kinds(Vec<(&'static str, &'static [&'static str])>),
    /// One value.
    Value,
}

/// The shape of `T`.
pub fn shape<T: DeserializeOwned>() -> Shape {
    match T::deserialize(Probe { kind: None }).err() {
        Some(Answer::Fields(fields)) => Shape::Fields(fields),
        Some(Answer::Kinds(kinds)) => {
            let fields = |kind| match T::deserialize(Probe { kind: Some(kind) }).err() {
                Some(Answer::Fields(fields)) => fields,
                _ => &[],
            };
            Shape::Kinds(kinds.iter().map(|kind| (*kind, fields(kind))).collect())
        }
        _ => Shape::Value,
    }
}

/// What a type asks a deserializer for, told as the error that ends its reading.
#[derive(Debug, thiserror::Error)]
enum Answer {
    #[error("It has properties")]
    Fields(&'static [&'static str]),
    #[error("It has kinds")]
    Kinds(&'static [&'static str]),
    #[error("It is a value")]
    Value,
}

impl Error for Answer {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self::Value
    }
}

struct Probe {
    kind: Option<&'static str>,
}

impl<'de> Deserializer<'de> for Probe {
    type Error = Answer;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Answer> {
        Err(Answer::Value)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Answer> {
        Err(Answer::Fields(fields))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Answer> {
        match self.kind {
            None => Err(Answer::Kinds(variants)),
            Some(_) => visitor.visit_enum(self),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

impl<'de> EnumAccess<'de> for Probe {
    type Error = Answer;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Answer> {
        let name: StrDeserializer<Answer> = self.kind.unwrap_or_default().into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Probe {
    type Error = Answer;

    fn unit_variant(self) -> Result<(), Answer> {
        Err(Answer::Value)
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Answer> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Answer> {
        Err(Answer::Value)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], _: V) -> Result<V::Value, Answer> {
        Err(Answer::Fields(fields))
    }
}
