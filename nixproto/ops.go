package nixproto

import (
	"fmt"
)

// An Op is the number of an operation of the worker protocol.
type Op uint64

// The operations that clients from Nix 2.4 on send, by Nix's numbers
// (libstore worker-protocol.hh).
const (
	OpIsValidPath                 Op = 1
	OpQueryReferrers              Op = 6
	OpAddToStore                  Op = 7
	OpBuildPaths                  Op = 9
	OpEnsurePath                  Op = 10
	OpAddTempRoot                 Op = 11
	OpAddIndirectRoot             Op = 12
	OpSyncWithGC                  Op = 13
	OpFindRoots                   Op = 14
	OpQueryDeriver                Op = 18
	OpSetOptions                  Op = 19
	OpCollectGarbage              Op = 20
	OpQueryAllValidPaths          Op = 23
	OpQueryPathInfo               Op = 26
	OpQueryPathFromHashPart       Op = 29
	OpQuerySubstitutablePathInfos Op = 30
	OpQueryValidPaths             Op = 31
	OpQuerySubstitutablePaths     Op = 32
	OpQueryValidDerivers          Op = 33
	OpOptimiseStore               Op = 34
	OpVerifyStore                 Op = 35
	OpBuildDerivation             Op = 36
	OpAddSignatures               Op = 37
	OpNarFromPath                 Op = 38
	OpAddToStoreNar               Op = 39
	OpQueryMissing                Op = 40
	OpQueryDerivationOutputMap    Op = 41
	OpRegisterDrvOutput           Op = 42
	OpQueryRealisation            Op = 43
	OpAddMultipleToStore          Op = 44
	OpAddBuildLog                 Op = 45
	OpBuildPathsWithResults       Op = 46
	OpAddPermRoot                 Op = 47
)

var opNames = map[Op]string{
	OpIsValidPath: "IsValidPath", OpQueryReferrers: "QueryReferrers", OpAddToStore: "AddToStore",
	OpBuildPaths: "BuildPaths", OpEnsurePath: "EnsurePath", OpAddTempRoot: "AddTempRoot",
	OpAddIndirectRoot: "AddIndirectRoot", OpSyncWithGC: "SyncWithGC", OpFindRoots: "FindRoots",
	OpQueryDeriver: "QueryDeriver", OpSetOptions: "SetOptions", OpCollectGarbage: "CollectGarbage",
	OpQueryAllValidPaths: "QueryAllValidPaths", OpQueryPathInfo: "QueryPathInfo",
	OpQueryPathFromHashPart:       "QueryPathFromHashPart",
	OpQuerySubstitutablePathInfos: "QuerySubstitutablePathInfos", OpQueryValidPaths: "QueryValidPaths",
	OpQuerySubstitutablePaths: "QuerySubstitutablePaths", OpQueryValidDerivers: "QueryValidDerivers",
	OpOptimiseStore: "OptimiseStore", OpVerifyStore: "VerifyStore", OpBuildDerivation: "BuildDerivation",
	OpAddSignatures: "AddSignatures", OpNarFromPath: "NarFromPath", OpAddToStoreNar: "AddToStoreNar",
	OpQueryMissing: "QueryMissing", OpQueryDerivationOutputMap: "QueryDerivationOutputMap",
	OpRegisterDrvOutput: "RegisterDrvOutput", OpQueryRealisation: "QueryRealisation",
	OpAddMultipleToStore: "AddMultipleToStore", OpAddBuildLog: "AddBuildLog",
	OpBuildPathsWithResults: "BuildPathsWithResults", OpAddPermRoot: "AddPermRoot",
}

// String returns the name that Nix has for the operation.
func (o Op) String() string {
	if name, ok := opNames[o]; ok {
		return name
	}
	return fmt.Sprintf("operation %d", uint64(o))
}

// An UnknownOpError says that a peer asked for an operation whose layout is not
// known here. Nothing is known of the bytes that follow it, so the connection
// has to be closed after the answer.
type UnknownOpError struct {
	Number uint64
}

func (e *UnknownOpError) Error() string {
	return fmt.Sprintf("operation %d is not supported", e.Number)
}

// A Request is one operation with its fields: a pointer to the struct named
// after it. Framed streams and NARs that follow some of them are not part of
// it; their comments say so.
type Request interface {
	// Op returns the operation.
	Op() Op
	// fields goes over the request's layout.
	fields(c codec)
	// answer returns an empty value of the response's type, nil if none follows.
	answer() Response
}

// A Response is what follows STDERR_LAST: a pointer to the type that the
// request's comment names.
type Response interface {
	fields(c codec)
}

func newRequest(op Op) Request {
	switch op {
	case OpIsValidPath:
		return new(IsValidPath)
	case OpQueryReferrers:
		return new(QueryReferrers)
	case OpAddToStore:
		return new(AddToStore)
	case OpBuildPaths:
		return new(BuildPaths)
	case OpEnsurePath:
		return new(EnsurePath)
	case OpAddTempRoot:
		return new(AddTempRoot)
	case OpAddIndirectRoot:
		return new(AddIndirectRoot)
	case OpSyncWithGC:
		return new(SyncWithGC)
	case OpFindRoots:
		return new(FindRoots)
	case OpQueryDeriver:
		return new(QueryDeriver)
	case OpSetOptions:
		return new(SetOptions)
	case OpCollectGarbage:
		return new(CollectGarbage)
	case OpQueryAllValidPaths:
		return new(QueryAllValidPaths)
	case OpQueryPathInfo:
		return new(QueryPathInfo)
	case OpQueryPathFromHashPart:
		return new(QueryPathFromHashPart)
	case OpQuerySubstitutablePathInfos:
		return new(QuerySubstitutablePathInfos)
	case OpQueryValidPaths:
		return new(QueryValidPaths)
	case OpQuerySubstitutablePaths:
		return new(QuerySubstitutablePaths)
	case OpQueryValidDerivers:
		return new(QueryValidDerivers)
	case OpOptimiseStore:
		return new(OptimiseStore)
	case OpVerifyStore:
		return new(VerifyStore)
	case OpBuildDerivation:
		return new(BuildDerivation)
	case OpAddSignatures:
		return new(AddSignatures)
	case OpNarFromPath:
		return new(NarFromPath)
	case OpAddToStoreNar:
		return new(AddToStoreNar)
	case OpQueryMissing:
		return new(QueryMissing)
	case OpQueryDerivationOutputMap:
		return new(QueryDerivationOutputMap)
	case OpRegisterDrvOutput:
		return new(RegisterDrvOutput)
	case OpQueryRealisation:
		return new(QueryRealisation)
	case OpAddMultipleToStore:
		return new(AddMultipleToStore)
	case OpAddBuildLog:
		return new(AddBuildLog)
	case OpBuildPathsWithResults:
		return new(BuildPathsWithResults)
	case OpAddPermRoot:
		return new(AddPermRoot)
	}
	return nil
}

// ReadRequest reads an operation and its fields. It returns io.EOF if the
// stream ends before the operation, *UnknownOpError, *ValueError together with
// the request if the reader stands behind it, or the error of the stream.
func ReadRequest(r *Reader, v Version) (Request, error) {
	if err := r.Await(); err != nil {
		return nil, err
	}
	r.begin()
	op := r.u64()
	if r.err != nil {
		return nil, r.err
	}
	req := newRequest(Op(op))
	if req == nil {
		return nil, &UnknownOpError{op}
	}
	req.fields(codec{r: r, v: v})
	return req, readError(r, req.Op())
}

// WriteRequest writes an operation and its fields, without flushing.
func WriteRequest(w *Writer, v Version, req Request) error {
	w.Uint64(uint64(req.Op()))
	req.fields(codec{w: w, v: v})
	return w.Err()
}

// ReadResponse reads what follows STDERR_LAST as the answer to req: nil if
// nothing does. A NAR after it is left to the caller.
func ReadResponse(r *Reader, v Version, req Request) (Response, error) {
	resp := req.answer()
	if resp == nil {
		return nil, nil
	}
	r.begin()
	resp.fields(codec{r: r, v: v})
	return resp, readError(r, req.Op())
}

// WriteResponse writes what follows STDERR_LAST, without flushing; a nil
// response is nothing.
func WriteResponse(w *Writer, v Version, resp Response) error {
	if resp != nil {
		resp.fields(codec{w: w, v: v})
	}
	return w.Err()
}

// readError returns the error of a message that was just read; what names it.
func readError(r *Reader, what fmt.Stringer) error {
	if r.err != nil {
		return fmt.Errorf("read %s: %w", what, r.err)
	}
	err := r.Err()
	r.bad = nil
	return err
}
