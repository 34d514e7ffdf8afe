package store

import (
	"context"

	"nbd/nixproto"
)

// Closure returns what roots refer to, directly or not, themselves included,
// each path after those that it refers to. A root that is not in the view is
// ErrNotFound.
func (s *Store) Closure(ctx context.Context, a AccountID, roots []nixproto.StorePath) ([]nixproto.StorePath, error) {
	infos, err := s.ClosureInfo(ctx, a, roots)
	if err != nil {
		return nil, err
	}
	paths := make([]nixproto.StorePath, len(infos))
	for i := range infos {
		paths[i] = infos[i].Path
	}
	return paths, nil
}

// ClosureInfo is Closure with what is known of each path.
func (s *Store) ClosureInfo(ctx context.Context, a AccountID, roots []nixproto.StorePath) (infos []nixproto.PathInfo, err error) {
	err = s.readView(a, func(v *view) error {
		return v.closure(ctx, roots, func(r *record) {
			infos = append(infos, r.PathInfo)
		})
	})
	return infos, err
}

// closure calls f with the records of the closure of roots, each after those
// of the paths it refers to.
func (v *view) closure(ctx context.Context, roots []nixproto.StorePath, f func(*record)) error {
	return walk(ctx, roots, v.want, f)
}
