package nixproto

import "fmt"

// A BuildMode says what a build request wants.
type BuildMode uint64

// The build modes.
const (
	BuildNormal BuildMode = iota
	BuildRepair
	BuildCheck // build again and compare
)

func (m *BuildMode) fields(c codec) {
	c.u64((*uint64)(m))
	if c.reading() && *m > BuildCheck {
		c.r.reject(fmt.Errorf("build mode %d is not known", *m))
	}
}

// IsValidPath asks whether a path is valid. Response: *Bool.
type IsValidPath struct{ Path StorePath }

// Op implements Request.
func (*IsValidPath) Op() Op           { return OpIsValidPath }
func (q *IsValidPath) fields(c codec) { c.path(&q.Path) }
func (*IsValidPath) answer() Response { return new(Bool) }

// QueryReferrers asks which paths refer to a path. Response: *PathSet.
type QueryReferrers struct{ Path StorePath }

// Op implements Request.
func (*QueryReferrers) Op() Op           { return OpQueryReferrers }
func (q *QueryReferrers) fields(c codec) { c.path(&q.Path) }
func (*QueryReferrers) answer() Response { return new(PathSet) }

// AddToStore adds a content-addressed object. A framed stream follows: the raw
// bytes of the file for the methods text and flat, a NAR for the others.
// Response: *ValidPathInfo.
type AddToStore struct {
	Name string
	// Method is a content address without its hash: "text:sha256",
	// "fixed:sha256", "fixed:r:sha256", "fixed:git:sha1" and so on.
	Method     string
	References []StorePath
	Repair     bool
}

// Op implements Request.
func (*AddToStore) Op() Op { return OpAddToStore }
func (q *AddToStore) fields(c codec) {
	c.str(&q.Name, maxSmall)
	if c.reading() {
		if err := CheckName(q.Name); err != nil {
			c.r.reject(fmt.Errorf("add to store: %w", err))
		}
	}
	c.str(&q.Method, maxSmall)
	c.paths(&q.References)
	c.bool(&q.Repair)
}
func (*AddToStore) answer() Response { return new(ValidPathInfo) }

// BuildPaths makes paths valid; a failed build is a STDERR_ERROR. Response: *Done.
type BuildPaths struct {
	Paths []DerivedPath
	Mode  BuildMode
}

// Op implements Request.
func (*BuildPaths) Op() Op { return OpBuildPaths }
func (q *BuildPaths) fields(c codec) {
	derivedPaths(c, &q.Paths)
	q.Mode.fields(c)
}
func (*BuildPaths) answer() Response { return new(Done) }

// EnsurePath makes a path valid by substitution. Response: *Done.
type EnsurePath struct{ Path StorePath }

// Op implements Request.
func (*EnsurePath) Op() Op           { return OpEnsurePath }
func (q *EnsurePath) fields(c codec) { c.path(&q.Path) }
func (*EnsurePath) answer() Response { return new(Done) }

// AddTempRoot keeps a path until the connection ends. Response: *Done.
type AddTempRoot struct{ Path StorePath }

// Op implements Request.
func (*AddTempRoot) Op() Op           { return OpAddTempRoot }
func (q *AddTempRoot) fields(c codec) { c.path(&q.Path) }
func (*AddTempRoot) answer() Response { return new(Done) }

// AddIndirectRoot names a link in the server's file system. Response: *Done.
type AddIndirectRoot struct{ Link string }

// Op implements Request.
func (*AddIndirectRoot) Op() Op           { return OpAddIndirectRoot }
func (q *AddIndirectRoot) fields(c codec) { c.str(&q.Link, maxSmall) }
func (*AddIndirectRoot) answer() Response { return new(Done) }

// SyncWithGC waits for a collection; obsolete. Response: *Done.
type SyncWithGC struct{}

// Op implements Request.
func (*SyncWithGC) Op() Op           { return OpSyncWithGC }
func (*SyncWithGC) fields(codec)     {}
func (*SyncWithGC) answer() Response { return new(Done) }

// FindRoots lists the roots of the collector. Response: *Roots.
type FindRoots struct{}

// Op implements Request.
func (*FindRoots) Op() Op           { return OpFindRoots }
func (*FindRoots) fields(codec)     {}
func (*FindRoots) answer() Response { return new(Roots) }

// QueryDeriver asks for a path's deriver; obsolete. Response: *OptionalPath.
type QueryDeriver struct{ Path StorePath }

// Op implements Request.
func (*QueryDeriver) Op() Op           { return OpQueryDeriver }
func (q *QueryDeriver) fields(c codec) { c.path(&q.Path) }
func (*QueryDeriver) answer() Response { return new(OptionalPath) }

// SetOptions sets options of the connection. Clients never send it over SSH.
// No response follows.
type SetOptions struct {
	KeepFailed, KeepGoing, TryFallback bool
	Verbosity, MaxBuildJobs            uint64
	MaxSilentTime                      uint64 // seconds
	VerboseBuild                       uint64 // 0 shows the builder's log
	BuildCores                         uint64
	UseSubstitutes                     bool
	Overrides                          map[string]string
}

// Op implements Request.
func (*SetOptions) Op() Op { return OpSetOptions }
func (q *SetOptions) fields(c codec) {
	c.bool(&q.KeepFailed)
	c.bool(&q.KeepGoing)
	c.bool(&q.TryFallback)
	c.u64(&q.Verbosity)
	c.u64(&q.MaxBuildJobs)
	c.u64(&q.MaxSilentTime)
	c.unused(1) // useBuildHook
	c.u64(&q.VerboseBuild)
	c.unused(0) // logType
	c.unused(0) // printBuildTrace
	c.u64(&q.BuildCores)
	c.bool(&q.UseSubstitutes)
	c.stringMap(&q.Overrides)
}
func (*SetOptions) answer() Response { return nil }

// A GCAction says what CollectGarbage does.
type GCAction uint64

// The actions.
const (
	GCReturnLive GCAction = iota
	GCReturnDead
	GCDeleteDead
	GCDeleteSpecific // only Paths
)

// CollectGarbage deletes or lists paths. Response: *Collected.
type CollectGarbage struct {
	Action         GCAction
	Paths          []StorePath
	IgnoreLiveness bool
	MaxFreed       uint64 // bytes; the largest number is no limit
}

// Op implements Request.
func (*CollectGarbage) Op() Op { return OpCollectGarbage }
func (q *CollectGarbage) fields(c codec) {
	c.u64((*uint64)(&q.Action))
	if c.reading() && q.Action > GCDeleteSpecific {
		c.r.reject(fmt.Errorf("collector's action %d is not known", q.Action))
	}
	c.paths(&q.Paths)
	c.bool(&q.IgnoreLiveness)
	c.u64(&q.MaxFreed)
	c.unused(0)
	c.unused(0)
	c.unused(0)
}
func (*CollectGarbage) answer() Response { return new(Collected) }

// QueryAllValidPaths lists the store. Response: *PathSet.
type QueryAllValidPaths struct{}

// Op implements Request.
func (*QueryAllValidPaths) Op() Op           { return OpQueryAllValidPaths }
func (*QueryAllValidPaths) fields(codec)     {}
func (*QueryAllValidPaths) answer() Response { return new(PathSet) }

// QueryPathInfo asks what is known of a path. Response: *OptionalPathInfo.
type QueryPathInfo struct{ Path StorePath }

// Op implements Request.
func (*QueryPathInfo) Op() Op             { return OpQueryPathInfo }
func (q *QueryPathInfo) fields(c codec)   { c.path(&q.Path) }
func (q *QueryPathInfo) answer() Response { return &OptionalPathInfo{path: q.Path} }

// QueryPathFromHashPart asks for the path with a hash part. Response: *OptionalPath.
type QueryPathFromHashPart struct{ HashPart string }

// Op implements Request.
func (*QueryPathFromHashPart) Op() Op { return OpQueryPathFromHashPart }
func (q *QueryPathFromHashPart) fields(c codec) {
	c.str(&q.HashPart, maxSmall)
	if c.reading() {
		if _, err := ParseBaseName(q.HashPart + "-x"); err != nil {
			c.r.reject(fmt.Errorf("%q is not the hash part of a store path", clip(q.HashPart)))
		}
	}
}
func (*QueryPathFromHashPart) answer() Response { return new(OptionalPath) }

// QuerySubstitutablePathInfos asks what substituters know of paths, given with
// their content addresses ("" for none). Response: *SubstitutablePathInfos.
type QuerySubstitutablePathInfos struct{ Paths map[StorePath]string }

// Op implements Request.
func (*QuerySubstitutablePathInfos) Op() Op { return OpQuerySubstitutablePathInfos }
func (q *QuerySubstitutablePathInfos) fields(c codec) {
	pathMap(c, &q.Paths, c.path, func(ca *string) { c.str(ca, maxSmall) })
}
func (*QuerySubstitutablePathInfos) answer() Response { return new(SubstitutablePathInfos) }

// QueryValidPaths asks which of the paths are valid; with Substitute the server
// may fetch the others first. Response: *PathSet.
type QueryValidPaths struct {
	Paths      []StorePath
	Substitute bool
}

// Op implements Request.
func (*QueryValidPaths) Op() Op { return OpQueryValidPaths }
func (q *QueryValidPaths) fields(c codec) {
	c.paths(&q.Paths)
	c.bool(&q.Substitute)
}
func (*QueryValidPaths) answer() Response { return new(PathSet) }

// QuerySubstitutablePaths asks which of the paths a substituter has. Response:
// *PathSet.
type QuerySubstitutablePaths struct{ Paths []StorePath }

// Op implements Request.
func (*QuerySubstitutablePaths) Op() Op           { return OpQuerySubstitutablePaths }
func (q *QuerySubstitutablePaths) fields(c codec) { c.paths(&q.Paths) }
func (*QuerySubstitutablePaths) answer() Response { return new(PathSet) }

// QueryValidDerivers asks which valid derivations have a path as output.
// Response: *PathSet.
type QueryValidDerivers struct{ Path StorePath }

// Op implements Request.
func (*QueryValidDerivers) Op() Op           { return OpQueryValidDerivers }
func (q *QueryValidDerivers) fields(c codec) { c.path(&q.Path) }
func (*QueryValidDerivers) answer() Response { return new(PathSet) }

// OptimiseStore stores equal files once. Response: *Done.
type OptimiseStore struct{}

// Op implements Request.
func (*OptimiseStore) Op() Op           { return OpOptimiseStore }
func (*OptimiseStore) fields(codec)     {}
func (*OptimiseStore) answer() Response { return new(Done) }

// VerifyStore checks the store. Response: *Bool, true if errors remain.
type VerifyStore struct{ CheckContents, Repair bool }

// Op implements Request.
func (*VerifyStore) Op() Op { return OpVerifyStore }
func (q *VerifyStore) fields(c codec) {
	c.bool(&q.CheckContents)
	c.bool(&q.Repair)
}
func (*VerifyStore) answer() Response { return new(Bool) }

// BuildDerivation builds a derivation whose inputs are all in the store: what
// the build hook sends. DrvPath need not exist. Response: *BuildResult.
type BuildDerivation struct {
	DrvPath    StorePath
	Derivation *Derivation // no InputDrvs
	Mode       BuildMode
}

// Op implements Request.
func (*BuildDerivation) Op() Op { return OpBuildDerivation }
func (q *BuildDerivation) fields(c codec) {
	basicDerivation(c, &q.DrvPath, &q.Derivation)
	q.Mode.fields(c)
}
func (*BuildDerivation) answer() Response { return new(BuildResult) }

// AddSignatures adds signatures to a valid path. Response: *Done.
type AddSignatures struct {
	Path       StorePath
	Signatures []string // "name:base64"
}

// Op implements Request.
func (*AddSignatures) Op() Op { return OpAddSignatures }
func (q *AddSignatures) fields(c codec) {
	c.path(&q.Path)
	c.stringSet(&q.Signatures)
}
func (*AddSignatures) answer() Response { return new(Done) }

// NarFromPath asks for a path's NAR, which follows STDERR_LAST as it is, neither
// framed nor with a length. No other response.
type NarFromPath struct{ Path StorePath }

// Op implements Request.
func (*NarFromPath) Op() Op           { return OpNarFromPath }
func (q *NarFromPath) fields(c codec) { c.path(&q.Path) }
func (*NarFromPath) answer() Response { return nil }

// AddToStoreNar adds a path. A framed NAR follows. No response.
type AddToStoreNar struct {
	Info                  PathInfo
	Repair, DontCheckSigs bool
}

// Op implements Request.
func (*AddToStoreNar) Op() Op { return OpAddToStoreNar }
func (q *AddToStoreNar) fields(c codec) {
	q.Info.fields(c)
	c.bool(&q.Repair)
	c.bool(&q.DontCheckSigs)
}
func (*AddToStoreNar) answer() Response { return nil }

// QueryMissing asks what it takes to make paths valid. Response: *Missing.
type QueryMissing struct{ Paths []DerivedPath }

// Op implements Request.
func (*QueryMissing) Op() Op           { return OpQueryMissing }
func (q *QueryMissing) fields(c codec) { derivedPaths(c, &q.Paths) }
func (*QueryMissing) answer() Response { return new(Missing) }

// QueryDerivationOutputMap asks for the outputs of a derivation in the store.
// Response: *OutputMap.
type QueryDerivationOutputMap struct{ Path StorePath }

// Op implements Request.
func (*QueryDerivationOutputMap) Op() Op           { return OpQueryDerivationOutputMap }
func (q *QueryDerivationOutputMap) fields(c codec) { c.path(&q.Path) }
func (*QueryDerivationOutputMap) answer() Response { return new(OutputMap) }

// RegisterDrvOutput says which path an output of a content-addressed derivation
// became. No response.
type RegisterDrvOutput struct{ Realisation Realisation }

// Op implements Request.
func (*RegisterDrvOutput) Op() Op           { return OpRegisterDrvOutput }
func (q *RegisterDrvOutput) fields(c codec) { realisationJSON(c, &q.Realisation) }
func (*RegisterDrvOutput) answer() Response { return nil }

// QueryRealisation asks which path an output of a content-addressed derivation
// became. Response: *RealisationSet.
type QueryRealisation struct {
	DrvHash    Hash
	OutputName string
}

// Op implements Request.
func (*QueryRealisation) Op() Op             { return OpQueryRealisation }
func (q *QueryRealisation) fields(c codec)   { drvOutput(c, &q.DrvHash, &q.OutputName) }
func (q *QueryRealisation) answer() Response { return new(RealisationSet) }

// AddMultipleToStore adds paths, references before what refers to them. A framed
// stream follows: their number (Uint64), then for each a ReadPathInfo and
// its NAR. No response.
type AddMultipleToStore struct{ Repair, DontCheckSigs bool }

// Op implements Request.
func (*AddMultipleToStore) Op() Op { return OpAddMultipleToStore }
func (q *AddMultipleToStore) fields(c codec) {
	c.bool(&q.Repair)
	c.bool(&q.DontCheckSigs)
}
func (*AddMultipleToStore) answer() Response { return nil }

// AddBuildLog adds the log of a build. A framed stream with its bytes follows.
// Response: *Done.
type AddBuildLog struct{ DrvPath StorePath }

// Op implements Request.
func (*AddBuildLog) Op() Op { return OpAddBuildLog }
func (q *AddBuildLog) fields(c codec) {
	// The only path on the wire that goes without the store directory.
	if !c.reading() {
		c.w.Str(q.DrvPath.Base())
		return
	}
	var err error
	if q.DrvPath, err = ParseBaseName(c.r.str(maxPathText)); err != nil {
		c.r.reject(err)
	}
}
func (*AddBuildLog) answer() Response { return new(Done) }

// BuildPathsWithResults makes paths valid; a failed build is an entry with its
// status. Response: *BuildResults.
type BuildPathsWithResults struct {
	Paths []DerivedPath
	Mode  BuildMode
}

// Op implements Request.
func (*BuildPathsWithResults) Op() Op { return OpBuildPathsWithResults }
func (q *BuildPathsWithResults) fields(c codec) {
	derivedPaths(c, &q.Paths)
	q.Mode.fields(c)
}
func (*BuildPathsWithResults) answer() Response { return new(BuildResults) }

// AddPermRoot makes a link to a path in the server's file system. Response:
// *Text, the link.
type AddPermRoot struct {
	Path StorePath
	Link string
}

// Op implements Request.
func (*AddPermRoot) Op() Op { return OpAddPermRoot }
func (q *AddPermRoot) fields(c codec) {
	c.path(&q.Path)
	c.str(&q.Link, maxSmall)
}
func (*AddPermRoot) answer() Response { return new(Text) }
