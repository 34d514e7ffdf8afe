package nixproto

// Done is the constant 1 that some operations answer.
type Done struct{}

func (*Done) fields(c codec) { c.constant(1, "the answer of an operation") }

// Bool answers yes or no.
type Bool bool

func (b *Bool) fields(c codec) { c.bool((*bool)(b)) }

// Text answers a text.
type Text string

func (t *Text) fields(c codec) { c.str((*string)(t), maxSmall) }

// PathSet answers with store paths, sorted.
type PathSet []StorePath

func (s *PathSet) fields(c codec) { c.paths((*[]StorePath)(s)) }

// OptionalPath answers with a store path, or "" for none.
type OptionalPath StorePath

func (p *OptionalPath) fields(c codec) { c.optPath((*StorePath)(p)) }

// ValidPathInfo answers with what is known of a path that was added.
type ValidPathInfo struct{ Info PathInfo }

func (p *ValidPathInfo) fields(c codec) { p.Info.fields(c) }

// OptionalPathInfo answers with what is known of a path.
type OptionalPathInfo struct {
	Info *PathInfo // nil if the path is not valid

	path StorePath // of the request: it is not in the answer
}

func (p *OptionalPathInfo) fields(c codec) {
	valid := p.Info != nil
	c.bool(&valid)
	if !valid {
		return
	}
	if c.reading() {
		p.Info = &PathInfo{Path: p.path}
	}
	p.Info.unkeyed(c)
}

// Roots answers with the roots of the collector.
type Roots []Root

// A Root is a link outside the store that keeps a path.
type Root struct {
	Link   string
	Target StorePath
}

func (s *Roots) fields(c codec) {
	items(c, (*[]Root)(s), func(r *Root) {
		c.str(&r.Link, maxSmall)
		c.path(&r.Target)
	})
}

// Collected answers what a collection did.
type Collected struct {
	Paths []string // sorted; what was or would be deleted
	Freed uint64   // bytes
}

func (a *Collected) fields(c codec) {
	c.stringSet(&a.Paths)
	c.u64(&a.Freed)
	c.unused(0)
}

// SubstitutablePathInfos answers what substituters know.
type SubstitutablePathInfos []SubstitutablePathInfo

// SubstitutablePathInfo is what a substituter knows of a path. The sizes are in
// bytes, 0 if unknown.
type SubstitutablePathInfo struct {
	Path, Deriver         StorePath
	References            []StorePath
	DownloadSize, NarSize uint64
}

func (s *SubstitutablePathInfos) fields(c codec) {
	items(c, (*[]SubstitutablePathInfo)(s), func(i *SubstitutablePathInfo) {
		c.path(&i.Path)
		c.optPath(&i.Deriver)
		c.paths(&i.References)
		c.u64(&i.DownloadSize)
		c.u64(&i.NarSize)
	})
}

// Missing answers what it takes to make paths valid.
type Missing struct {
	WillBuild             []StorePath // derivations
	WillSubstitute        []StorePath
	Unknown               []StorePath
	DownloadSize, NarSize uint64 // bytes
}

func (m *Missing) fields(c codec) {
	c.paths(&m.WillBuild)
	c.paths(&m.WillSubstitute)
	c.paths(&m.Unknown)
	c.u64(&m.DownloadSize)
	c.u64(&m.NarSize)
}

// OutputMap answers with the outputs of a derivation by name; "" if an output's
// path is not known yet.
type OutputMap map[string]StorePath

func (m *OutputMap) fields(c codec) {
	pathMap(c, (*map[string]StorePath)(m), func(name *string) { c.str(name, maxSmall) }, c.optPath)
}

// BuildResults answers a request for several paths, in the order of the request.
type BuildResults []KeyedBuildResult

// A KeyedBuildResult is the result for one of the requested paths.
type KeyedBuildResult struct {
	Path DerivedPath
	BuildResult
}

func (s *BuildResults) fields(c codec) {
	items(c, (*[]KeyedBuildResult)(s), func(k *KeyedBuildResult) {
		k.Path.fields(c)
		k.BuildResult.fields(c)
	})
}

// RealisationSet answers with at most one realisation.
type RealisationSet []Realisation

func (s *RealisationSet) fields(c codec) {
	items(c, (*[]Realisation)(s), func(r *Realisation) { realisationJSON(c, r) })
}
