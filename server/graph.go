package server

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"nbd/nixproto"
)

// A graph is what one request for derived paths needs: derivations whose
// outputs are wanted, and those that they depend on as far as those have to be
// built. It is planned from the wanted ones down, then built from the leaves
// up. Nothing recurses; chains may be as long as they like.
type graph struct {
	b     *Builds
	s     *Session
	sent  Limits             // by the client, with the request
	most  int                // builds at once
	mode  nixproto.BuildMode // of what was asked for itself; inputs are built normally
	dry   bool               // nothing is fetched or built
	log   LogSink            // nil if dry
	memo  *drvMemo
	nodes map[nixproto.StorePath]*node
	todo  []*node // to be planned, or planned again for further outputs
	// offered are the paths that caches had, or have, and fetches what they say
	// of them, if dry.
	offered map[nixproto.StorePath]bool
	fetches []*nixproto.NarInfo
}

// A node is one derivation of a graph.
type node struct {
	path   nixproto.StorePath
	drv    *nixproto.Derivation // nil if it could not be read
	hash   nixproto.Hash        // zero until something needs it
	top    bool                 // it was asked for, not only needed
	wanted map[string]bool      // outputs, not all of them if it is not to be built

	// paths are those of the outputs that are known to be valid.
	paths map[string]nixproto.StorePath
	// absent says that the derivation itself is not in the view.
	absent bool
	// build says that not all wanted outputs are valid.
	build bool
	// deps are the derivations that it depends on; complete only if build.
	deps []*node

	// For the building:
	users  []*node
	waits  int   // deps that are not done
	failed *node // one dep that failed
	broken int   // how many did
	done   bool
	asked  bool                  // it became a request, which has a record
	result *nixproto.BuildResult // set with done, or by a refusal when it was planned
}

func (b *Builds) newGraph(s *Session, mode nixproto.BuildMode) *graph {
	return &graph{b: b, s: s, mode: mode, most: maxParallel, memo: b.drvs.of(s.account()), nodes: make(map[nixproto.StorePath]*node), offered: make(map[nixproto.StorePath]bool)}
}

// BuildPaths implements Builder.
func (b *Builds) BuildPaths(ctx context.Context, s *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error) {
	results := make([]nixproto.KeyedBuildResult, len(req.Paths))
	set, err := b.policy(s, nil, req.Limits)
	if err != nil {
		for i, p := range req.Paths {
			results[i] = nixproto.KeyedBuildResult{Path: p, BuildResult: *failed(nixproto.InputRejected, err)}
			if p.Built() {
				b.noteRefused(ctx, s, p.Path, nil, req.Limits, &results[i].BuildResult)
			}
		}
		return results, nil
	}
	g := b.newGraph(s, req.Mode)
	g.sent, g.log = req.Limits, log
	if set.maxRunning > 0 { // past that a build is refused
		g.most = min(g.most, set.maxRunning)
	}
	if err := g.plan(ctx, req.Paths); err != nil {
		return nil, err
	}
	if err := g.check(ctx); err != nil {
		return nil, err
	}
	if err := g.run(ctx, log); err != nil {
		return nil, err
	}
	for i, p := range req.Paths {
		result, err := g.resultOf(ctx, p)
		if err != nil {
			return nil, err
		}
		results[i] = nixproto.KeyedBuildResult{Path: p, BuildResult: *result}
		if p.Built() {
			g.noteAnswer(ctx, g.nodes[p.Path], result)
		}
	}
	return results, nil
}

// Missing implements Builder.
func (b *Builds) Missing(ctx context.Context, s *Session, paths []nixproto.DerivedPath) (*Missing, error) {
	g := b.newGraph(s, nixproto.BuildNormal)
	g.dry = true
	if err := g.plan(ctx, paths); err != nil {
		return nil, err
	}
	m := &Missing{}
	for _, p := range paths {
		if p.Built() {
			if n := g.nodes[p.Path]; n.absent {
				m.Unknown = append(m.Unknown, n.path)
			}
			continue
		}
		valid, err := s.Sight.Valid(ctx, []nixproto.StorePath{p.Path})
		if err != nil {
			return nil, err
		}
		if len(valid) == 0 && !g.offered[p.Path] {
			m.Unknown = append(m.Unknown, p.Path)
		}
	}
	for _, n := range g.nodes {
		if n.build {
			m.WillBuild = append(m.WillBuild, n.path)
		}
	}
	g.addFetches(m)
	slices.Sort(m.WillBuild)
	slices.Sort(m.Unknown)
	m.Unknown = slices.Compact(m.Unknown)
	return m, nil
}

// OutputMap implements Builder.
func (b *Builds) OutputMap(ctx context.Context, s *Session, path nixproto.StorePath) (map[string]nixproto.StorePath, error) {
	drv, err := b.readDrv(ctx, s, path)
	if err != nil {
		return nil, err
	}
	g := b.newGraph(s, nixproto.BuildNormal)
	n := &node{path: path, drv: drv}
	outputs := make(map[string]nixproto.StorePath, len(drv.Outputs))
	for name, out := range drv.Outputs {
		if outputs[name] = out.Path; out.Path != "" {
			continue
		}
		if err := g.hashOf(ctx, n); err != nil {
			return nil, err
		}
		if n.result != nil {
			return nil, refusef("%s", n.result.Error)
		}
		real, err := s.Sight.Realisation(ctx, n.hash, name)
		if notThere(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		outputs[name] = real.OutPath
	}
	return outputs, nil
}

// plan finds out which derivations have to be built for the wanted paths.
func (g *graph) plan(ctx context.Context, wanted []nixproto.DerivedPath) error {
	if g.b.cfg.Substituter != nil {
		if err := g.askCachesForOpaque(ctx, wanted); err != nil {
			return err
		}
	}
	for _, p := range wanted {
		if !p.Built() {
			continue
		}
		n, err := g.want(ctx, p.Path, p.Outputs, p.AllOutputs)
		if err != nil {
			return err
		}
		n.top = true
	}
	for len(g.todo) > 0 {
		level := g.todo
		g.todo = nil
		if g.b.cfg.Substituter != nil {
			if err := g.askCaches(ctx, level); err != nil {
				return err
			}
		}
		for _, n := range level {
			if err := g.planOne(ctx, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// want says that outputs of a derivation are wanted, and returns its node.
func (g *graph) want(ctx context.Context, path nixproto.StorePath, outputs []string, all bool) (*node, error) {
	n := g.nodes[path]
	if n == nil {
		n = &node{path: path, wanted: make(map[string]bool)}
		g.nodes[path] = n
		if err := g.load(ctx, n); err != nil {
			return nil, err
		}
	}
	if n.drv == nil {
		return n, nil
	}
	if all {
		outputs = n.drv.OutputNames()
	}
	more := false
	for _, name := range outputs {
		if !n.wanted[name] {
			n.wanted[name], more = true, true
		}
	}
	if more && !n.build && n.result == nil {
		g.todo = append(g.todo, n)
	}
	return n, nil
}

// load reads the derivation of n; one that is no good is n's result.
func (g *graph) load(ctx context.Context, n *node) error {
	drv, err := g.b.readDrv(ctx, g.s, n.path)
	n.drv = drv
	switch {
	case err == nil:
		_, err := drv.Kind()
		if err != nil {
			n.result = failed(nixproto.InputRejected, err)
		}
		return nil
	case notThere(err):
		n.absent = true
		n.result = failed(nixproto.MiscFailure, notValid(n.path))
		return nil
	case isRefusal(err):
		n.result = failed(nixproto.InputRejected, err)
		return nil
	}
	return err
}

// planOne decides whether n has to be built, and wants what it depends on then.
func (g *graph) planOne(ctx context.Context, n *node) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if n.build || n.result != nil {
		return nil
	}
	if floats(n.drv) {
		if err := g.hashOf(ctx, n); err != nil || n.result != nil {
			return err
		}
	}
	known, err := g.b.findOutputs(ctx, g.s, n.drv, n.hash)
	if err != nil {
		return err
	}
	n.paths = known.paths
	for name := range n.wanted {
		if _, ok := n.drv.Outputs[name]; !ok {
			n.result = failed(nixproto.MiscFailure, refusef("derivation '%s' has no output '%s'", n.path, name))
			return nil
		}
		n.build = n.build || n.paths[name] == "" && !(g.dry && g.offered[n.drv.Outputs[name].Path])
	}
	n.build = n.build || n.top && g.mode != nixproto.BuildNormal
	if !n.build {
		return nil
	}
	for _, path := range slices.Sorted(maps.Keys(n.drv.InputDrvs)) {
		dep, err := g.want(ctx, path, n.drv.InputDrvs[path], false)
		if err != nil {
			return err
		}
		n.deps = append(n.deps, dep)
	}
	return nil
}

// floats reports whether paths of outputs have to be looked up.
func floats(drv *nixproto.Derivation) bool {
	kind, err := drv.Kind()
	return err == nil && kind != nixproto.InputAddressed && kind != nixproto.FixedOutput
}

// hashOf finds the hash modulo of n. One that cannot be computed is n's result.
func (g *graph) hashOf(ctx context.Context, n *node) error {
	if !n.hash.IsZero() {
		return nil
	}
	return g.hashing(ctx, n, func(m *nixproto.Modulo) (err error) {
		n.hash, err = m.RealisationHash(n.drv)
		return err
	})
}

// hashing calls f with what computes hashes. An error of its own, of a
// derivation that is not as it should be, is n's result.
func (g *graph) hashing(ctx context.Context, n *node, f func(*nixproto.Modulo) error) error {
	var fault error // of our own, or of ctx
	lookup := func(p nixproto.StorePath) (*nixproto.Derivation, error) {
		if fault = context.Cause(ctx); fault != nil {
			return nil, fault
		}
		if known := g.nodes[p]; known != nil && known.drv != nil {
			return known.drv, nil
		}
		drv, err := g.b.readDrv(ctx, g.s, p)
		if err != nil && !notThere(err) && !isRefusal(err) {
			fault = err
		}
		return drv, err
	}
	err := g.memo.use(lookup, f)
	if fault != nil {
		return fault
	}
	if err != nil {
		n.result = failed(nixproto.InputRejected, refusef("cannot build '%s': %v", n.path, err))
	}
	return nil
}

// check refuses nodes that are not built here, or whose output paths, or those
// of what they depend on, are not their own: the hash of a derivation does not
// tell what it says of its own outputs.
func (g *graph) check(ctx context.Context) error {
	for _, n := range g.nodes {
		if n.result != nil || !n.build && !n.top {
			continue
		}
		if err := g.hashOf(ctx, n); err != nil {
			return err
		}
		if n.result != nil || !n.build {
			continue
		}
		if err := g.b.checkOffered(ctx, n.path, n.drv); isRefusal(err) {
			n.result = failed(nixproto.InputRejected, err)
			continue
		} else if err != nil {
			return err
		}
		err := g.hashing(ctx, n, func(m *nixproto.Modulo) error {
			for _, dep := range n.deps {
				if dep.drv == nil || dep.result != nil || dep.build { // which is checked by itself
					continue
				}
				if err := m.Check(dep.drv); err != nil {
					return fmt.Errorf("its input '%s': %w", dep.path, err)
				}
			}
			return m.Check(n.drv)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// resultOf returns the result of one wanted path.
func (g *graph) resultOf(ctx context.Context, p nixproto.DerivedPath) (*nixproto.BuildResult, error) {
	if !p.Built() {
		g.s.Keep(p.Path)
		valid, err := g.s.Sight.Valid(ctx, []nixproto.StorePath{p.Path})
		if err != nil {
			return nil, err
		}
		if len(valid) == 0 {
			return failed(nixproto.NoSubstituters, refusef("path '%s' is not valid, and this server cannot make it", p.Path)), nil
		}
		return &nixproto.BuildResult{Status: nixproto.AlreadyValid}, nil
	}
	n := g.nodes[p.Path]
	result := nixproto.BuildResult{Status: nixproto.AlreadyValid, Outputs: builtOutputs(n.hash, n.paths)}
	switch {
	case n.result != nil:
		result = *n.result
	case n.build:
		result = *failed(nixproto.MiscFailure, refusef("cannot build '%s': it depends on itself", n.path))
	}
	if !p.AllOutputs {
		result.Outputs = maps.Clone(result.Outputs)
		maps.DeleteFunc(result.Outputs, func(name string, _ nixproto.Realisation) bool { return !slices.Contains(p.Outputs, name) })
	}
	return &result, nil
}
