package nixproto

import (
	"math"
	"strings"
)

// Values for the tests of all layouts: each field differs from its zero value.

const (
	pathA = StorePath("/nix/store/00000000000000000000000000000000-a")
	pathB = StorePath("/nix/store/11111111111111111111111111111111-b")
	pathD = StorePath("/nix/store/22222222222222222222222222222222-d.drv")
)

var (
	hashA = NewHash(SHA256, []byte("0123456789abcdef0123456789abcdef"))

	sampleInfo = PathInfo{
		Path: pathB, Deriver: pathD, NarHash: hashA, NarSize: 1 << 40, References: []StorePath{pathA, pathB},
		RegistrationTime: -1, Ultimate: true, Signatures: []string{"k-1:AAAA", "k-2:AAAA"}, CA: "fixed:r:sha256:x",
	}

	sampleReal = Realisation{
		DrvHash: hashA, OutputName: "out", OutPath: pathA, Signatures: []string{"k:A"},
		Dependent: map[string]string{"sha256:" + hashA.Base16() + "!dev": pathB.Base()},
	}

	sampleDrv = &Derivation{
		Name: "d",
		Outputs: map[string]DerivationOutput{
			"out": {Path: pathA},
			"dev": {HashAlgo: "r:sha256", Hash: "impure"},
		},
		InputSrcs: []StorePath{pathA, pathB}, System: "x86_64-linux", Builder: "/bin/sh",
		Args: []string{"-c", "", "x\x00y"}, Env: map[string]string{"": "e", "__json": "{}", "a": ""},
	}

	samplePaths = []DerivedPath{
		{Path: pathA}, {Path: pathD, AllOutputs: true}, {Path: pathD, Outputs: []string{"out", "dev"}},
	}
)

// sampleResult returns a result as version v can tell it.
func sampleResult(v Version) BuildResult {
	b := BuildResult{
		Status: TimedOut, Error: "slow", TimesBuilt: 2, NonDeterministic: true, StartTime: 3, StopTime: math.MaxInt64,
		Outputs: map[string]Realisation{"out": sampleReal},
	}
	if !v.serve() && v.Minor() >= 37 {
		user, system := int64(5), int64(-6)
		b.CPUUser, b.CPUSystem = &user, &system
	}
	if v == MinServe {
		b.Outputs = nil
	}
	return b
}

// sampleRequests returns one of each.
func sampleRequests() []Request {
	return []Request{
		&IsValidPath{pathA},
		&QueryReferrers{pathA},
		&AddToStore{Name: "n", Method: "fixed:git:sha1", References: []StorePath{pathA}, Repair: true},
		&BuildPaths{samplePaths, BuildRepair},
		&EnsurePath{pathA},
		&AddTempRoot{pathA},
		&AddIndirectRoot{"/result"},
		&SyncWithGC{},
		&FindRoots{},
		&QueryDeriver{pathA},
		&SetOptions{true, true, true, 1, 2, 3, 4, 5, true, map[string]string{"cores": "3"}},
		&CollectGarbage{GCDeleteSpecific, []StorePath{pathA}, true, math.MaxUint64},
		&QueryAllValidPaths{},
		&QueryPathInfo{pathB},
		&QueryPathFromHashPart{pathA.HashPart()},
		&QuerySubstitutablePathInfos{map[StorePath]string{pathA: "", pathB: "text:sha256:x"}},
		&QueryValidPaths{[]StorePath{pathA, pathB}, true},
		&QuerySubstitutablePaths{[]StorePath{pathA}},
		&QueryValidDerivers{pathA},
		&OptimiseStore{},
		&VerifyStore{true, true},
		&BuildDerivation{pathD, sampleDrv, BuildCheck},
		&AddSignatures{pathA, []string{"a:b", "c:d"}},
		&NarFromPath{pathA},
		&AddToStoreNar{sampleInfo, true, true},
		&QueryMissing{samplePaths},
		&QueryDerivationOutputMap{pathD},
		&RegisterDrvOutput{sampleReal},
		&QueryRealisation{hashA, "dev"},
		&AddMultipleToStore{true, true},
		&AddBuildLog{pathD},
		&BuildPathsWithResults{samplePaths, BuildNormal},
		&AddPermRoot{pathA, "/result"},
	}
}

// sampleResponses returns answers to a request, at least one if it has any.
func sampleResponses(v Version, req Request) []Response {
	b := sampleResult(v)
	switch req.(type) {
	case *IsValidPath, *VerifyStore:
		return []Response{new(Bool(false)), new(Bool(true))}
	case *QueryReferrers, *QueryAllValidPaths, *QueryValidPaths, *QuerySubstitutablePaths, *QueryValidDerivers:
		return []Response{new(PathSet), &PathSet{pathA, pathB}}
	case *AddToStore:
		return []Response{&ValidPathInfo{sampleInfo}}
	case *QueryDeriver, *QueryPathFromHashPart:
		return []Response{new(OptionalPath), new(OptionalPath(pathA))}
	case *FindRoots:
		return []Response{new(Roots), &Roots{{"/result", pathA}}}
	case *CollectGarbage:
		return []Response{&Collected{[]string{string(pathA)}, 7}}
	case *QueryPathInfo:
		return []Response{&OptionalPathInfo{path: pathB}, &OptionalPathInfo{Info: &sampleInfo, path: pathB}}
	case *QuerySubstitutablePathInfos:
		return []Response{&SubstitutablePathInfos{{pathA, pathD, []StorePath{pathB}, 1, 2}, {Path: pathB}}}
	case *BuildDerivation:
		return []Response{&b}
	case *QueryMissing:
		return []Response{&Missing{[]StorePath{pathD}, []StorePath{pathA}, []StorePath{pathB}, 1, 2}}
	case *QueryDerivationOutputMap:
		return []Response{&OutputMap{"out": pathA, "dev": ""}}
	case *QueryRealisation:
		return []Response{new(RealisationSet), &RealisationSet{sampleReal}}
	case *BuildPathsWithResults:
		return []Response{&BuildResults{{samplePaths[0], b}, {samplePaths[1], b}, {samplePaths[2], b}}}
	case *AddPermRoot:
		return []Response{new(Text("/result"))}
	case *SetOptions, *NarFromPath, *AddToStoreNar, *RegisterDrvOutput, *AddMultipleToStore:
		return nil
	}
	return []Response{new(Done)}
}

// sampleServeRequests returns one of each, as version v can tell it.
func sampleServeRequests(v Version) []ServeRequest {
	o := BuildOptions{1, 2, 3, 4, true, v.Minor() >= 7}
	legacy := []DerivedPath{samplePaths[0], samplePaths[1], {Path: pathD, Outputs: []string{"dev"}}}
	return []ServeRequest{
		&ServeQueryValidPaths{true, true, []StorePath{pathA}},
		&ServeQueryPathInfos{[]StorePath{pathA, pathB}},
		&ServeDumpStorePath{pathA},
		&ServeImportPaths{},
		&ServeExportPaths{true, []StorePath{pathA}},
		&ServeBuildPaths{legacy, o},
		&ServeQueryClosure{true, []StorePath{pathA}},
		&ServeBuildDerivation{pathD, sampleDrv, o},
		&ServeAddToStoreNar{sampleInfo},
	}
}

// sampleServeResponses is sampleResponses for the serve protocol.
func sampleServeResponses(v Version, req ServeRequest) []Response {
	// Its path infos know neither the time nor who built.
	info := sampleInfo
	info.RegistrationTime, info.Ultimate = 0, false
	b := sampleResult(v)
	switch req.(type) {
	case *ServeQueryValidPaths, *ServeQueryClosure:
		return []Response{new(PathSet), &PathSet{pathA, pathB}}
	case *ServeQueryPathInfos:
		return []Response{new(ServePathInfos), &ServePathInfos{info, info}}
	case *ServeBuildPaths:
		return []Response{&ServeBuildStatus{}, &ServeBuildStatus{MiscFailure, "no"}}
	case *ServeBuildDerivation:
		return []Response{&b}
	case *ServeImportPaths, *ServeAddToStoreNar:
		return []Response{new(Done)}
	}
	return nil
}

func sampleLogs() []LogMessage {
	fields := []Field{TextField("t"), NumberField(1), TextField("")}
	return []LogMessage{
		&LogNext{"line\n"},
		&LogRead{5},
		&LogWrite{[]byte("data")},
		&LogLast{},
		&LogError{Level: LevelInfo, Name: "n", Message: "m", Traces: []string{"a", "b"}},
		&LogError{Message: strings.Repeat("long ", 2000)},
		&LogStartActivity{1 << 40, LevelInfo, ActBuild, "building", fields, 7},
		&LogStopActivity{9},
		&LogResult{1, ResBuildLogLine, fields},
	}
}
