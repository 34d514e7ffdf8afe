package server

import (
	"context"
	"maps"
	"slices"

	"nbd/nixproto"
)

// What clients ask of the caches in the server's settings.

// mayFetch reports whether caches are asked for the client at all, and for what
// it did not ask to be fetched.
func (ss *session) mayFetch() (may, always bool, err error) {
	if ss.server.cfg.Substituter == nil || ss.Client.mayUpload() != nil {
		return false, false, nil
	}
	e, err := ss.currentSettings()
	return !e.NeverSubstitute, e.AlwaysSubstitute, err
}

// validOrFetched returns those of the paths that the client can use. If it
// asked for that, or has always-substitute set, paths that caches have are
// fetched before, within what operation gives f.
func (ss *session) validOrFetched(paths []nixproto.StorePath, asked bool, operation func(f func(context.Context, LogSink) error) error) ([]nixproto.StorePath, error) {
	valid, err := ss.valid(paths)
	if err != nil || len(valid) == len(paths) {
		return valid, err
	}
	may, always, err := ss.mayFetch()
	if err != nil || !may || !asked && !always {
		return valid, err
	}
	err = operation(func(ctx context.Context, log LogSink) (err error) {
		valid, err = ss.server.cfg.Substituter.Ensure(ctx, ss.Session, paths, log)
		return err
	})
	return valid, err
}

// ensurePath makes a path valid, or says that it is not.
func (w *worker) ensurePath(p nixproto.StorePath) (nixproto.Response, error) {
	valid, err := w.validOrFetched([]nixproto.StorePath{p}, true, w.building)
	if err == nil && len(valid) == 0 {
		err = notValid(p)
	}
	return &nixproto.Done{}, err
}

// substitutable asks caches for paths, each of which is told only if it could
// be fetched with all that it refers to.
func (w *worker) substitutable(paths []nixproto.StorePath) ([]*nixproto.NarInfo, error) {
	may, _, err := w.mayFetch()
	if err != nil || !may {
		return nil, err
	}
	var infos []*nixproto.NarInfo
	err = w.building(func(ctx context.Context, _ LogSink) error {
		t, err := w.server.cfg.Substituter.Query(ctx, w.Session, paths)
		if err != nil {
			return err
		}
		asked := make(map[nixproto.StorePath]bool, len(paths))
		for _, p := range paths {
			asked[p] = true
		}
		for _, n := range t.Infos {
			if asked[n.Path] {
				infos = append(infos, n)
			}
		}
		return nil
	})
	return infos, err
}

func (w *worker) querySubstitutablePaths(paths []nixproto.StorePath) (nixproto.Response, error) {
	infos, err := w.substitutable(paths)
	set := nixproto.PathSet{}
	for _, n := range infos {
		set = append(set, n.Path)
	}
	return answer[nixproto.PathSet](set, err)
}

func (w *worker) querySubstitutablePathInfos(paths map[nixproto.StorePath]string) (nixproto.Response, error) {
	infos, err := w.substitutable(slices.Sorted(maps.Keys(paths)))
	answers := nixproto.SubstitutablePathInfos{}
	for _, n := range infos {
		answers = append(answers, nixproto.SubstitutablePathInfo{
			Path: n.Path, Deriver: n.Deriver, References: n.References,
			DownloadSize: n.FileSize, NarSize: n.NarSize,
		})
	}
	return answer[nixproto.SubstitutablePathInfos](answers, err)
}
