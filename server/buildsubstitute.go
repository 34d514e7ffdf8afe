package server

import (
	"context"
	"slices"

	"nbd/nixproto"
)

// What builds ask of caches: outputs that need not be built then, and inputs
// that the client did not bring.

// mayFetch reports what caches are asked for on behalf of a derivation: its
// inputs, its outputs. As in Nix, one that says allowSubstitutes = false is
// always built, unless always-substitute is set.
func (b *Builds) mayFetch(s *Session, drv *nixproto.Derivation, sent Limits) (inputs, outputs bool, err error) {
	if b.cfg.Substituter == nil {
		return false, false, nil
	}
	e, err := s.settingsFor(drv, sent)
	if err != nil || e.NeverSubstitute {
		return false, false, err
	}
	if e.AlwaysSubstitute || drv == nil {
		return true, true, nil
	}
	attrs, err := attrsOf(drv)
	if err != nil { // somebody else tells
		return true, true, nil
	}
	return true, attrs.allowed("allowSubstitutes"), nil
}

// allowed returns an attribute that is true or false; true if it is not set.
func (a drvAttrs) allowed(name string) bool {
	if a.structured == nil {
		_, set := a.env[name]
		return !set || a.bool(name)
	}
	return string(a.structured[name]) != "false"
}

// fetchOutputs brings those outputs of j that caches have, and reports whether
// all are there then, or why not.
func (b *Builds) fetchOutputs(ctx context.Context, s *Session, j *job, log LogSink) (complete bool, why string, err error) {
	paths := staticOutputs(j.drv)
	if len(paths) < len(j.drv.Outputs) {
		return false, "caches are asked for paths, and those of the outputs are not known yet", nil
	}
	if _, outputs, err := b.mayFetch(s, j.drv, j.sent); err != nil || !outputs {
		return false, "caches are not asked for it, or there are none", err
	}
	have, err := b.cfg.Substituter.Ensure(ctx, s, paths, log)
	return len(have) == len(paths), "no cache that answers has all outputs, signed by a trusted key", err
}

// fetchInputs brings those inputs of j that are not there.
func (b *Builds) fetchInputs(ctx context.Context, s *Session, j *job, log LogSink) error {
	valid, err := s.Sight.Valid(ctx, j.drv.InputSrcs)
	if err != nil || len(valid) == len(j.drv.InputSrcs) {
		return err
	}
	if inputs, _, err := b.mayFetch(s, j.drv, j.sent); err != nil || !inputs {
		return err
	}
	_, err = b.cfg.Substituter.Ensure(ctx, s, j.drv.InputSrcs, log)
	return err
}

// askCaches fetches the wanted outputs of nodes that are to be planned, or, if
// the graph is only asked about, finds out which could be.
func (g *graph) askCaches(ctx context.Context, nodes []*node) error {
	var paths []nixproto.StorePath
	for _, n := range nodes {
		if n.build || n.result != nil || n.drv == nil || n.top && g.mode != nixproto.BuildNormal {
			continue
		}
		if _, outputs, err := g.b.mayFetch(g.s, n.drv, g.sent); err != nil || !outputs {
			if err != nil {
				return err
			}
			continue
		}
		for name := range n.wanted {
			if p := n.drv.Outputs[name].Path; p != "" {
				paths = append(paths, p)
			}
		}
	}
	return g.askCachesFor(ctx, paths)
}

func (g *graph) askCachesFor(ctx context.Context, paths []nixproto.StorePath) error {
	if len(paths) == 0 {
		return nil
	}
	slices.Sort(paths)
	if !g.dry {
		have, err := g.b.cfg.Substituter.Ensure(ctx, g.s, slices.Compact(paths), g.log)
		for _, p := range have {
			g.offered[p] = true
		}
		return err
	}
	t, err := g.b.cfg.Substituter.Query(ctx, g.s, slices.Compact(paths))
	if err != nil {
		return err
	}
	for _, n := range t.Infos {
		if !g.offered[n.Path] {
			g.offered[n.Path] = true
			g.fetches = append(g.fetches, n)
		}
	}
	return nil
}

// askCachesForOpaque is askCaches for paths that are wanted by themselves.
func (g *graph) askCachesForOpaque(ctx context.Context, wanted []nixproto.DerivedPath) error {
	var paths []nixproto.StorePath
	for _, p := range wanted {
		if !p.Built() {
			paths = append(paths, p.Path)
		}
	}
	if inputs, _, err := g.b.mayFetch(g.s, nil, g.sent); err != nil || !inputs {
		return err
	}
	return g.askCachesFor(ctx, paths)
}

// addFetches says in m what would be fetched.
func (g *graph) addFetches(m *Missing) {
	for _, n := range g.fetches {
		m.WillSubstitute = append(m.WillSubstitute, n.Path)
		m.DownloadSize += n.FileSize
		m.NarSize += n.NarSize
	}
	slices.Sort(m.WillSubstitute)
}
