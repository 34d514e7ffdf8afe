package nixproto

import "fmt"

// A ServeCommand is the number of a command of the serve protocol.
type ServeCommand uint64

// The commands, by Nix's numbers (libstore serve-protocol.hh).
const (
	CmdQueryValidPaths ServeCommand = iota + 1
	CmdQueryPathInfos
	CmdDumpStorePath
	CmdImportPaths
	CmdExportPaths
	CmdBuildPaths
	CmdQueryClosure
	CmdBuildDerivation
	CmdAddToStoreNar
)

// String returns the name of the command, or its number.
func (n ServeCommand) String() string {
	names := [...]string{"QueryValidPaths", "QueryPathInfos", "DumpStorePath", "ImportPaths",
		"ExportPaths", "BuildPaths", "QueryClosure", "BuildDerivation", "AddToStoreNar"}
	if n >= 1 && int(n) <= len(names) {
		return names[n-1]
	}
	return fmt.Sprintf("command %d", uint64(n))
}

// A ServeRequest is one command with its fields: a pointer to one of the Serve
// structs. NARs and export streams that follow some of them are not part of it.
// The protocol has no log messages and no errors: the response follows at once.
type ServeRequest interface {
	// Command returns the command.
	Command() ServeCommand
	fields(c codec)
	answer() Response // as Request's
}

// BuildOptions are what a client of the serve protocol wants of a build. A zero
// limit is none.
type BuildOptions struct {
	MaxSilentTime, Timeout uint64 // seconds
	MaxLogSize             uint64 // bytes
	Repeats                uint64 // 0 in all clients of today
	EnforceDeterminism     bool
	KeepFailed             bool // from 2.7 on
}

func (o *BuildOptions) fields(c codec) {
	c.u64(&o.MaxSilentTime)
	c.u64(&o.Timeout)
	c.u64(&o.MaxLogSize)
	c.u64(&o.Repeats)
	c.bool(&o.EnforceDeterminism)
	if c.v.Minor() >= 7 {
		c.bool(&o.KeepFailed)
	}
}

// ServeQueryValidPaths asks which of the paths are valid; Lock keeps those until
// the connection ends. Response: *PathSet.
type ServeQueryValidPaths struct {
	Lock, Substitute bool
	Paths            []StorePath
}

// Command implements ServeRequest.
func (*ServeQueryValidPaths) Command() ServeCommand { return CmdQueryValidPaths }
func (q *ServeQueryValidPaths) fields(c codec) {
	c.bool(&q.Lock)
	c.bool(&q.Substitute)
	c.paths(&q.Paths)
}
func (*ServeQueryValidPaths) answer() Response { return new(PathSet) }

// ServeQueryPathInfos asks what is known of those of the paths that are valid.
// Response: *ServePathInfos.
type ServeQueryPathInfos struct{ Paths []StorePath }

// Command implements ServeRequest.
func (*ServeQueryPathInfos) Command() ServeCommand { return CmdQueryPathInfos }
func (q *ServeQueryPathInfos) fields(c codec)      { c.paths(&q.Paths) }
func (*ServeQueryPathInfos) answer() Response      { return new(ServePathInfos) }

// ServeDumpStorePath asks for a path's NAR, which is the response.
type ServeDumpStorePath struct{ Path StorePath }

// Command implements ServeRequest.
func (*ServeDumpStorePath) Command() ServeCommand { return CmdDumpStorePath }
func (q *ServeDumpStorePath) fields(c codec)      { c.path(&q.Path) }
func (*ServeDumpStorePath) answer() Response      { return nil }

// ServeImportPaths adds paths; an export stream follows. Response: *Done.
type ServeImportPaths struct{}

// Command implements ServeRequest.
func (*ServeImportPaths) Command() ServeCommand { return CmdImportPaths }
func (*ServeImportPaths) fields(codec)          {}
func (*ServeImportPaths) answer() Response      { return new(Done) }

// ServeExportPaths asks for paths as an export stream, which is the response.
type ServeExportPaths struct {
	Sign  bool // obsolete
	Paths []StorePath
}

// Command implements ServeRequest.
func (*ServeExportPaths) Command() ServeCommand { return CmdExportPaths }
func (q *ServeExportPaths) fields(c codec) {
	c.bool(&q.Sign)
	c.paths(&q.Paths)
}
func (*ServeExportPaths) answer() Response { return nil }

// ServeBuildPaths makes paths valid. Response: *ServeBuildStatus.
type ServeBuildPaths struct {
	Paths   []DerivedPath
	Options BuildOptions
}

// Command implements ServeRequest.
func (*ServeBuildPaths) Command() ServeCommand { return CmdBuildPaths }
func (q *ServeBuildPaths) fields(c codec) {
	derivedPaths(c, &q.Paths)
	q.Options.fields(c)
}
func (*ServeBuildPaths) answer() Response { return new(ServeBuildStatus) }

// ServeQueryClosure asks for the closure of the paths, themselves included.
// Response: *PathSet.
type ServeQueryClosure struct {
	IncludeOutputs bool // of derivations in it
	Paths          []StorePath
}

// Command implements ServeRequest.
func (*ServeQueryClosure) Command() ServeCommand { return CmdQueryClosure }
func (q *ServeQueryClosure) fields(c codec) {
	c.bool(&q.IncludeOutputs)
	c.paths(&q.Paths)
}
func (*ServeQueryClosure) answer() Response { return new(PathSet) }

// ServeBuildDerivation builds a derivation whose inputs are all in the store.
// Response: *BuildResult.
type ServeBuildDerivation struct {
	DrvPath    StorePath
	Derivation *Derivation // no InputDrvs
	Options    BuildOptions
}

// Command implements ServeRequest.
func (*ServeBuildDerivation) Command() ServeCommand { return CmdBuildDerivation }
func (q *ServeBuildDerivation) fields(c codec) {
	basicDerivation(c, &q.DrvPath, &q.Derivation)
	q.Options.fields(c)
}
func (*ServeBuildDerivation) answer() Response { return new(BuildResult) }

// ServeAddToStoreNar adds a path; its NAR follows, neither framed nor with a
// length. Response: *Done.
type ServeAddToStoreNar struct{ Info PathInfo }

// Command implements ServeRequest.
func (*ServeAddToStoreNar) Command() ServeCommand { return CmdAddToStoreNar }
func (q *ServeAddToStoreNar) fields(c codec)      { q.Info.fields(c) }
func (*ServeAddToStoreNar) answer() Response      { return new(Done) }

// ServePathInfos answers with what is known of valid paths.
type ServePathInfos []PathInfo

func (s *ServePathInfos) fields(c codec) {
	if !c.reading() {
		for i := range *s {
			c.w.Path((*s)[i].Path)
			(*s)[i].serveFields(c)
		}
		c.w.Str("")
		return
	}
	*s = nil
	for {
		text := c.r.str(maxPathText)
		if text == "" || !c.r.charge(structCost) {
			return
		}
		path, err := ParseStorePath(text)
		if err != nil {
			c.r.reject(err)
		}
		p := PathInfo{Path: path}
		p.serveFields(c)
		*s = append(*s, p)
	}
}

// ServeBuildStatus answers BuildPaths. Clients take some numbers of success for
// others and lose step, so every success is written as Built.
type ServeBuildStatus struct {
	Status BuildStatus
	Error  string // of a failure
}

func (s *ServeBuildStatus) fields(c codec) {
	if !c.reading() && s.Status.Success() {
		c.w.Uint64(uint64(Built))
		return
	}
	c.u64((*uint64)(&s.Status))
	if !s.Status.Success() {
		c.str(&s.Error, MaxMessage)
	}
}

func newServeRequest(n ServeCommand) ServeRequest {
	switch n {
	case CmdQueryValidPaths:
		return new(ServeQueryValidPaths)
	case CmdQueryPathInfos:
		return new(ServeQueryPathInfos)
	case CmdDumpStorePath:
		return new(ServeDumpStorePath)
	case CmdImportPaths:
		return new(ServeImportPaths)
	case CmdExportPaths:
		return new(ServeExportPaths)
	case CmdBuildPaths:
		return new(ServeBuildPaths)
	case CmdQueryClosure:
		return new(ServeQueryClosure)
	case CmdBuildDerivation:
		return new(ServeBuildDerivation)
	case CmdAddToStoreNar:
		return new(ServeAddToStoreNar)
	}
	return nil
}

// ReadServeRequest reads a command and its fields. Its errors are ReadRequest's.
func ReadServeRequest(r *Reader, v Version) (ServeRequest, error) {
	if err := r.Await(); err != nil {
		return nil, err
	}
	r.begin()
	n := r.u64()
	if r.err != nil {
		return nil, r.err
	}
	req := newServeRequest(ServeCommand(n))
	if req == nil {
		return nil, &UnknownOpError{n}
	}
	req.fields(codec{r: r, v: v})
	return req, readError(r, req.Command())
}

// WriteServeRequest writes a command and its fields, without flushing.
func WriteServeRequest(w *Writer, v Version, req ServeRequest) error {
	w.Uint64(uint64(req.Command()))
	req.fields(codec{w: w, v: v})
	return w.Err()
}

// ReadServeResponse reads the answer to req: nil if a stream is the answer.
func ReadServeResponse(r *Reader, v Version, req ServeRequest) (Response, error) {
	resp := req.answer()
	if resp == nil {
		return nil, nil
	}
	r.begin()
	resp.fields(codec{r: r, v: v})
	return resp, readError(r, req.Command())
}
