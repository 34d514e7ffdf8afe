package server

import (
	"context"

	"nbd/nixproto"
)

// BuildPaths implements Builder.
func (b *Builds) BuildPaths(ctx context.Context, s *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error) {
	return nil, errEnding
}

// Missing implements Builder.
func (b *Builds) Missing(ctx context.Context, s *Session, paths []nixproto.DerivedPath) (*Missing, error) {
	return nil, errEnding
}

// OutputMap implements Builder.
func (b *Builds) OutputMap(ctx context.Context, s *Session, drv nixproto.StorePath) (map[string]nixproto.StorePath, error) {
	return nil, errEnding
}
