package server

import (
	"context"
	"io"
	"time"

	"nbd/nixproto"
)

// A Builder makes paths valid by building them (build.go). All methods may be
// called concurrently, each on behalf of one session.
//
// A build belongs to the Builder, not to the session that asked: cancelling
// ctx withdraws this session's interest, and the call returns soon after with
// ctx's error. Logs reach the sink from a spool at the sink's own pace; a sink
// that blocks delays nobody but the call it was given to.
//
// An error is a fault of the request or of the server (errors.go turns it into
// what the client sees); a build that ran and failed is a result, not an error.
type Builder interface {
	// Build answers one BuildDerivation request: a derivation whose inputs are
	// all named. Its name and the path of its file are as the client gave them.
	Build(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error)

	// BuildPaths makes derived paths valid, building whatever their derivations
	// need, in parallel. There is one result for each path, in order; a path
	// that could not be had is a result with a failure, not an error.
	BuildPaths(ctx context.Context, s *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error)

	// Missing says what BuildPaths would have to do.
	Missing(ctx context.Context, s *Session, paths []nixproto.DerivedPath) (*Missing, error)

	// OutputMap returns the outputs of a derivation in the session's view by
	// name, valid or not; an output whose path is not known yet is "". It
	// returns store.ErrNotFound for a derivation that is not there.
	OutputMap(ctx context.Context, s *Session, drv nixproto.StorePath) (map[string]nixproto.StorePath, error)
}

// A BuildRequest is a BuildDerivation request of either protocol.
type BuildRequest struct {
	DrvPath nixproto.StorePath
	Drv     *nixproto.Derivation // Name is that of DrvPath, InputDrvs is nil
	Mode    nixproto.BuildMode
	Limits  Limits
}

// A PathsRequest is a BuildPaths or BuildPathsWithResults request.
type PathsRequest struct {
	Paths  []nixproto.DerivedPath
	Mode   nixproto.BuildMode
	Limits Limits
}

// Limits are those that came with a request, which only the serve protocol
// carries. A zero field is not set.
type Limits struct {
	Timeout    time.Duration
	MaxSilent  time.Duration
	MaxLogSize int64 // bytes
}

// Missing is the answer to QueryMissing; its lists have no duplicates.
type Missing = nixproto.Missing

// A LogSink shows a client what goes on. Its methods block while the client
// does not read, may be called concurrently, and write each message whole.
// Once the client is gone they do nothing; the session's context tells.
type LogSink interface {
	// StartBuild opens the log of one build, live or replayed, as an activity
	// of the client's progress bar.
	StartBuild(drv nixproto.StorePath) BuildLog
	// StartWait shows that a build waits, and why ("waiting for a machine: 3
	// builds are ahead"). Calling stop takes the text away.
	StartWait(drv nixproto.StorePath, why string) (stop func())
	// StartCopy shows that a path is copied from a cache. Calling stop says that
	// it has ended.
	StartCopy(path nixproto.StorePath, from string) (stop func())
	// Progress tells how many builds of this request are done, expected,
	// running and failed so far.
	Progress(done, expected, running, failed uint64)
	// Note shows a line of the server's own, outside any builder's log.
	Note(text string)
}

// A BuildLog takes what a builder printed, byte for byte, in pieces of any
// size. It is used by one goroutine at a time.
type BuildLog interface {
	io.Writer // never fails; see LogSink
	// Stop flushes a last line without newline and ends the activity.
	Stop()
}
