//! In which format a scraper gets the page: OpenMetrics if it says that it takes that, as Prometheus
//! does; the older plain text for everybody else.

/// A text format for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFormat {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus's own, 0.0.4.
    Plain,
}

impl PageFormat {
    /// What suits somebody who sent this header.
    pub fn accepted(accept: Option<&str>) -> PageFormat {
        match accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
            true => PageFormat::OpenMetrics,
            false => PageFormat::Plain,
        }
    }

    /// What the text is, as HTTP says it.
    pub fn content_type(self) -> &'static str {
        match self {
            PageFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            PageFormat::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// An OpenMetrics page in this format.
    pub fn of(self, page: String) -> String {
        match self {
            PageFormat::OpenMetrics => page,
            PageFormat::Plain => plain(&page),
        }
    }
}

/// In plain text a counter goes by the name of its samples, and there is neither unit nor end.
fn plain(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let mut help = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let about = help.take().map_or("", |(_, about)| about);
            for part in ["# HELP ", name, suffix, " ", about, "\n"] {
                text.push_str(part);
            }
            for part in ["# TYPE ", name, suffix, " ", kind, "\n"] {
                text.push_str(part);
            }
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_takes_openmetrics_gets_it() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
        assert_eq!(PageFormat::accepted(Some(prometheus)), PageFormat::OpenMetrics);
        for other in [None, Some("*/*"), Some("text/plain"), Some("")] {
            assert_eq!(PageFormat::accepted(other), PageFormat::Plain);
        }
    }

    #[test]
    fn counters_go_by_their_samples_in_plain_text() {
        let page = "# HELP a_bytes Bytes of a\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\n\
                    a_bytes_total{x=\"y\"} 1\n# HELP b Of b\n# TYPE b gauge\nb 2\n# EOF\n";
        let plain = "# HELP a_bytes_total Bytes of a\n# TYPE a_bytes_total counter\n\
                     a_bytes_total{x=\"y\"} 1\n# HELP b Of b\n# TYPE b gauge\nb 2\n";
        assert_eq!(PageFormat::Plain.of(page.to_owned()), plain);
        assert_eq!(PageFormat::OpenMetrics.of(page.to_owned()), page);
    }
}
