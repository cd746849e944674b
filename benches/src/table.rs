//! Figures for a reader.

use std::fmt::Write;
use std::time::Duration;

/// The middle value; of an even number, the lower of the two. Zero of none.
pub fn median(values: impl IntoIterator<Item = Duration>) -> Duration {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_unstable();
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).copied().unwrap_or_default()
}

/// Milliseconds with two decimals.
pub fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

/// A Markdown table. The first row is the head.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {} |", row.join(" | "));
        if index == 0 {
            let _ = writeln!(text, "|{}", " --- |".repeat(row.len()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        let ms = Duration::from_millis;
        assert_eq!(median([ms(3), ms(1), ms(2)]), ms(2));
        assert_eq!(median([ms(4), ms(1), ms(2), ms(3)]), ms(2));
        assert_eq!(median([]), ms(0));
    }

    #[test]
    fn a_table_has_a_line_below_its_head() {
        let rows = [vec!["a".into(), "b".into()], vec!["1".into(), "2".into()]];
        assert_eq!(markdown(&rows), "| a | b |\n| --- | --- |\n| 1 | 2 |\n");
    }
}
