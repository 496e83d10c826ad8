//! The expressions of the dashboard: Prometheus takes each, and each finds something, unless it looks
//! for what a sound node without probes and promotion has nothing of.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::prometheus::Prometheus;
use super::{may_be_absent, packaging, read};
use crate::tool::json;

/// What Grafana would put in the place of its variables.
const VARIABLES: [(&str, &str); 3] =
    [("$__rate_interval", "10s"), ("$instance", ".*"), ("$export", ".*")];

/// Checks the packaged dashboard.
pub fn check(prometheus: &Prometheus) -> Result<String> {
    let board = json(&read(&packaging("grafana/underlay.json"))?)?;
    let mut ids = Vec::new();
    let (mut count, mut empty) = (0, 0);
    for panel in board["panels"].as_array().context("the dashboard has no panels")? {
        let title = panel["title"].as_str().unwrap_or_default();
        ensure!(!title.is_empty(), "a panel without a title: {}", panel["id"]);
        ensure!(!ids.contains(&panel["id"]), "two panels with the id {}", panel["id"]);
        ids.push(panel["id"].clone());
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().with_context(|| title.to_string())?;
            let mut filled = expression.to_string();
            for (name, value) in VARIABLES {
                filled = filled.replace(name, value);
            }
            // `$1` is what label_replace has found.
            let unknown = filled.replace("\"$1\"", "").contains('$');
            ensure!(!unknown, "{title}: an unknown variable: {expression}");
            let found = prometheus.query(&filled)?;
            count += 1;
            // What only shows when something is wrong.
            let faults = expression.ends_with("> 0");
            if found.is_empty() {
                empty += 1;
                ensure!(faults || may_be_absent(expression), "{title}: nothing: {filled}");
            }
        }
    }
    for variable in board["templating"]["list"].as_array().into_iter().flatten() {
        let Some(series) = variable["definition"].as_str().and_then(of_label_values) else {
            ensure!(variable["type"] == "datasource", "what is {}?", variable["name"]);
            continue;
        };
        let series = series.replace("$instance", ".*");
        ensure!(!prometheus.query(&series)?.is_empty(), "{}: no {series}", variable["name"]);
    }
    let panels = board["panels"].as_array().map_or(0, Vec::len);
    ensure!(ids.iter().all(Value::is_number) && count > 40, "{count} expressions");
    Ok(format!("{count} expressions in {panels} panels and rows, {empty} without data here"))
}

/// The series in `label_values(SERIES, LABEL)`.
fn of_label_values(definition: &str) -> Option<&str> {
    Some(definition.strip_prefix("label_values(")?.rsplit_once(", ")?.0)
}
