//! The Health service.

use agent_proto::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse, health_check_response};
use agent_proto::health_ttrpc::Health;
use async_trait::async_trait;
use ttrpc::r#async::TtrpcContext;

/// Version of the wire API, as kata's agent counts it.
const API_VERSION: &str = "0.0.1";

/// Answers as long as the agent lives, which is all that a check can find out.
pub struct Service;

#[async_trait]
impl Health for Service {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        let status = health_check_response::ServingStatus::SERVING.into();
        Ok(HealthCheckResponse { status, ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: API_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }
}
