"Readers and writers against hand-made files, SimpleITK, pydicom and nibabel; every fault gets a typed error and no noise"
import shutil
import warnings
from pathlib import Path
import numpy as np, pydicom, pytest, SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from covid_ct.data.catalog import write_series
from covid_ct.data.io import list_series, orientation, read, read_mask, reorient, write_map, write_mask, write_scan
from covid_ct.scan import DataError, GeometryError, Map, ReadError, Scan, UnitsError, VoxelError, check_same_grid

def chest(shape=(12,20,24), seed=0):
    "A made-up scan without any symmetry, on a grid with odd numbers"
    rng = np.random.default_rng(seed)
    v = rng.integers(-1024, 1500, shape).astype('i2'); v[:2] = -1000
    return Scan(v, (2.5,.8,.7), (-101.5,33.25,-17.75), patient_id='somebody', scan_id=f's{seed}')

@pytest.fixture
def scan(): return chest()

def write(scan, path, code='LPS', turn=np.eye(3), voxels=None):
    "Write with SimpleITK alone, along `code`, turned by a rotation (xyz)"
    v,g = reorient(scan.voxels if voxels is None else voxels, scan.grid, 'LPS', code)
    im = sitk.GetImageFromArray(np.ascontiguousarray(v)); im.SetSpacing(g.spacing[::-1]); im.SetOrigin(g.origin[::-1])
    im.SetDirection((turn@np.array(g.direction)[::-1,::-1]).ravel()); sitk.WriteImage(im, str(path)); return path

def spin(deg, a=1, b=2):
    R = np.eye(3); c,s = np.cos(np.radians(deg)),np.sin(np.radians(deg)); R[a,a]=R[b,b]=c; R[a,b],R[b,a] = -s,s; return R

def put(tag, value):
    def change(d, k): setattr(d, tag, value(d,k) if callable(value) else value)
    return change

# orientation

def test_reorient_is_itks_in_all_48_codes(scan):
    im = sitk.GetImageFromArray(scan.voxels); im.SetSpacing(scan.spacing[::-1]); im.SetOrigin(scan.origin[::-1])
    codes = [a+b+c for axes in ('LPS','PSL','SLP','LSP','SPL','PLS') for a in pair(axes[0]) for b in pair(axes[1]) for c in pair(axes[2])]
    assert len(set(codes))==48
    for code in codes:
        v,g = reorient(scan.voxels, scan.grid, 'LPS', code); itk = sitk.DICOMOrient(im, code)
        assert np.array_equal(v, sitk.GetArrayViewFromImage(itk)) and orientation(g)==code
        assert np.allclose(g.origin[::-1], itk.GetOrigin()) and np.allclose(g.spacing[::-1], itk.GetSpacing())
        back,h = reorient(v, g, code, 'LPS')
        assert np.array_equal(back, scan.voxels) and np.allclose(h.origin, scan.origin, atol=1e-12) and h.direction==scan.direction

def pair(c): return next(p for p in ('LR','PA','SI') if c in p)

# volume files

@pytest.mark.parametrize('end', ['.nii','.nii.gz','.mha','.mhd','.nrrd'])
@pytest.mark.parametrize('code', ['LPS','RAS','LAS','LIP','ASR'])
def test_formats_and_orientations(tmp_path, scan, end, code):
    s = read(write(scan, tmp_path/f'x{end}', code))
    assert np.array_equal(s.voxels, scan.voxels) and s.units=='HU' and s.stored_as==code and s.scan_id=='x' and s.voxels.dtype=='i2'
    check_same_grid(s, scan)

def test_nifti_equals_nibabel(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    im = nib.load(write(scan, tmp_path/'x.nii.gz', 'RAS', spin(9))); s = read(tmp_path/'x.nii.gz')
    ijk = np.array([3,7,5]); ras = im.affine@[*ijk,1]; lps = ras[:3]*[-1,-1,1]
    at = np.round(s.grid.to_index(lps[::-1])).astype(int)
    assert np.allclose(s.grid.to_index(lps[::-1]), at, atol=1e-3) and s.voxels[tuple(at)]==np.asarray(im.dataobj)[tuple(ijk)]

def test_scaled_and_big_endian_nifti(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    for head in (nib.Nifti1Header(endianness='>'), nib.Nifti1Header()):
        im = nib.Nifti1Image(scan.voxels.transpose(2,1,0), np.diag([-.7,-.8,2.5,1]), head); im.set_qform(im.affine, 1)
        im.header.set_data_dtype('i2')
        if head.endianness!='>': im.header.set_slope_inter(2, -24)
        nib.save(im, tmp_path/'x.nii.gz'); want = np.asarray(nib.load(tmp_path/'x.nii.gz').dataobj).transpose(2,1,0)
        s = read(tmp_path/'x.nii.gz'); assert np.array_equal(s.voxels, np.maximum(want,-1024)) or np.abs(s.voxels-want).max()<1
        whole = (tmp_path/'x.nii.gz').read_bytes(); (tmp_path/'y.nii.gz').write_bytes(whole[:len(whole)*2//3])
        with pytest.raises(ReadError): read(tmp_path/'y.nii.gz')

@pytest.mark.parametrize('end', ['.nii','.nii.gz','.mha','.mhd','.nrrd'])
@pytest.mark.parametrize('what', ['half','empty','text','most','missing'])
def test_damaged_volumes(tmp_path, scan, end, what):
    p = write(scan, tmp_path/f'x{end}'); body = tmp_path/'x.raw' if end=='.mhd' and what in ('half','most') else p
    whole = body.read_bytes()
    if what=='missing': p.unlink()
    else: body.write_bytes(dict(half=whole[:len(whole)//2], empty=b'', text=b'no scan at all\n'*50, most=whole[:-40])[what])
    with pytest.raises(ReadError) as e: read(p)
    assert p.name in str(e.value) and e.value.remedy

def test_a_flipped_byte_is_noticed(tmp_path, scan):
    big = chest((40,64,64)); p = write(big, tmp_path/'x.nii.gz'); whole = p.read_bytes()
    silent = 0
    for at in np.linspace(400, len(whole)-40, 12).astype(int):
        p.write_bytes(whole[:at]+bytes([whole[at]^0x55])+whole[at+1:])
        try: silent += not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(p))), big.voxels)
        except RuntimeError: pass
        with pytest.raises(DataError): read(p)
    assert silent>0 # else ITK looks by itself and our check can go

def test_mhd_without_its_raw(tmp_path, scan):
    p = write(scan, tmp_path/'x.mhd'); (tmp_path/'x.raw').unlink()
    with pytest.raises(ReadError, match='x.raw'): read(p)

def test_unknown_geometry_is_refused_or_stamped(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    im = nib.Nifti1Image(scan.voxels.transpose(2,1,0), None); im.header.set_zooms((.7,.8,2.5)); nib.save(im, tmp_path/'a.nii.gz')
    p = write(scan, tmp_path/'b.mha'); raw = p.read_bytes(); p.write_bytes(b'\n'.join(l for l in raw.split(b'\n',20) if not l.startswith(b'ElementSpacing')))
    for name in ('a.nii.gz','b.mha'):
        with pytest.raises(GeometryError, match='geometry is unknown'): read(tmp_path/name)
        s = read(tmp_path/name, allow_unknown_geometry=True); assert not s.geometry_known and 'unknown' in s.remarks[0]

def test_sheared_nifti_is_refused(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    a = np.diag([.7,.8,2.5,1]); a[1,2] = 1.; nib.save(nib.Nifti1Image(scan.voxels.transpose(2,1,0), a), tmp_path/'x.nii.gz')
    with pytest.raises(DataError): read(tmp_path/'x.nii.gz')

@pytest.mark.parametrize('shape,error', [((20,24),GeometryError), ((1,20,24),GeometryError), ((2,4,20,24),GeometryError), ((1,12,20,24),None)])
def test_dimensions(tmp_path, shape, error):
    v = np.random.default_rng(0).integers(-1024, 900, shape).astype('i2')
    sitk.WriteImage(sitk.GetImageFromArray(v, isVector=False), str(tmp_path/'x.nii.gz'))
    if error is None: assert np.array_equal(read(tmp_path/'x.nii.gz').voxels, v[0])
    else:
        with pytest.raises(error, match='volume'): read(tmp_path/'x.nii.gz')

def test_colours_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4,8,8,3),'u1'), isVector=True), str(tmp_path/'x.nrrd'))
    with pytest.raises(ReadError, match='colours'): read(tmp_path/'x.nrrd')

# values and units

def test_values(tmp_path, scan):
    f = scan.voxels.astype('f4')
    for bad in (np.nan, np.inf, -np.inf):
        for end in ('.nii','.nii.gz','.mha','.nrrd'):
            g = f.copy(); g[1,2,3] = bad; write(scan, tmp_path/f'x{end}', voxels=g)
            with pytest.raises(VoxelError, match='1 voxels are NaN'): read(tmp_path/f'x{end}')
    write(scan, tmp_path/'c.nii.gz', voxels=np.full(scan.shape, -1000,'i2'))
    with pytest.raises(VoxelError, match='every voxel'): read(tmp_path/'c.nii.gz')
    for voxels,units,kind in ((f,'HU','i2'), (f+.25,'HU','f4'), ((scan.voxels.clip(0,255)).astype('u1'),'uint8','u1'), (f.clip(0,255)/255,'unit','f4'), (scan.voxels.astype('i4'),'HU','i2')):
        s = read(write(scan, tmp_path/'v.nii.gz', voxels=voxels)); assert s.units==units and s.voxels.dtype==kind and np.array_equal(s.voxels, np.maximum(voxels.astype('f8'),-1024))
    with pytest.raises(UnitsError, match='neither|not HU'): read(write(scan, tmp_path/'u.nii.gz', voxels=scan.voxels+1024))
    s = read(tmp_path/'u.nii.gz', units='HU'); assert s.units=='HU' and 'perhaps not HU' in s.remarks[-1]
    with pytest.raises(UnitsError): read(write(scan, tmp_path/'w.nii.gz'), units='uint8')

@pytest.mark.parametrize('pad', [-3024,-2048,-2000])
def test_padding(tmp_path, scan, pad):
    v = scan.voxels.copy(); v[:,:3,:3] = pad; s = read(write(scan, tmp_path/'x.nii.gz', voxels=v))
    assert np.array_equal(s.voxels, np.maximum(v,-1024)) and str(pad) in s.remarks[0]

def test_lost_intercept_with_padding_is_no_hu(tmp_path, scan):
    v = scan.voxels+1024; v[:,:3,:3] = -2000
    with pytest.raises(UnitsError): read(write(scan, tmp_path/'x.nii.gz', voxels=v.astype('i2')))

# pictures

def pictures(folder, n=11, shape=(16,18), end='png', offset=0):
    folder.mkdir(exist_ok=True); rng = np.random.default_rng(0); v = rng.integers(0, 256, (n,*shape)).astype('u1')
    for k in range(n): sitk.WriteImage(sitk.GetImageFromArray(v[k]), str(folder/f'{k+offset}.{end}'))
    return v

@pytest.mark.parametrize('end', ['png','bmp','tif','jpg'])
def test_pictures_sort_as_people_count(tmp_path, end):
    v = pictures(tmp_path/'p', end=end)
    with pytest.raises(GeometryError, match='geometry is unknown'): read(tmp_path/'p')
    s = read(tmp_path/'p', allow_unknown_geometry=True)
    assert s.units=='uint8' and not s.geometry_known and s.spacing==(1,1,1) and s.scan_id=='p'
    assert np.array_equal(s.voxels, v) if end!='jpg' else np.abs(s.voxels.astype(int)-v).mean()<40

def test_odd_pictures(tmp_path):
    v = pictures(tmp_path/'p'); sitk.WriteImage(sitk.GetImageFromArray(v[4]), str(tmp_path/'p'/'5.png'))
    sitk.WriteImage(sitk.GetImageFromArray(v[10]), str(tmp_path/'p'/'11.jpg'))
    said = ' '.join(read(tmp_path/'p', allow_unknown_geometry=True).remarks); assert '1 slices repeat' in said and 'mixed endings' in said
    sitk.WriteImage(sitk.GetImageFromArray(v[0][:9]), str(tmp_path/'p'/'3.png'))
    with pytest.raises(GeometryError, match='3.png'): read(tmp_path/'p', allow_unknown_geometry=True)
    (tmp_path/'p'/'3.png').write_bytes(b'\x89PNG not really')
    with pytest.raises(ReadError, match='3.png'): read(tmp_path/'p', allow_unknown_geometry=True)
    with pytest.raises(GeometryError, match='one picture'): read(tmp_path/'p'/'1.png', allow_unknown_geometry=True)

# DICOM

def test_dicom_is_the_scan_whatever_the_names(tmp_path, scan):
    rng = np.random.default_rng(3); order = rng.permutation(12)
    folder = write_series(scan, tmp_path/'d', put('InstanceNumber', lambda d,k: int(order[k])), name='x{k}')
    for k in range(12): (folder/f'x{k+1}').rename(folder/f'{order[k]:03d}.dcm')
    s = read(folder)
    assert np.array_equal(s.voxels, scan.voxels) and s.units=='HU' and s.source==str(folder); check_same_grid(s, scan)

def test_no_identity_leaves_the_reader(tmp_path, scan):
    s = read(write_series(scan, tmp_path/'d', put('PatientName','Doe^Jane')))
    assert 'somebody' not in repr(vars(s)) and 'Doe' not in repr(vars(s)) and len(s.patient_id)==len(s.scan_id)==8
    t = read(write_series(chest(seed=4), tmp_path/'e')); assert t.patient_id==s.patient_id and t.scan_id!=s.scan_id
    assert read(tmp_path/'d', patient_id='P1', scan_id='a').patient_id=='P1'

def shift(axis, mm): return put('ImagePositionPatient', lambda d,k: [float(x)+mm(k)*(i==axis) for i,x in enumerate(d.ImagePositionPatient)])
TRAPS = {'missing slice': (lambda d,k: k!=5, '5 and 6 of 11, at .*1 missing'), 'two missing': (lambda d,k: k not in (5,6), '2 missing'),
         'uneven': (shift(2, lambda k: .6*(k>6)), 'mm apart'), 'twin': (shift(2, lambda k: -2.5*(k==4)), 'where another one lies'),
         'all at one place': (shift(2, lambda k: -2.5*k), '12 of 12'), 'tilt': (shift(1, lambda k: k), 'tilted by 21.8°'), 'jump': (shift(0, lambda k: 9*(k>6)), 'sideways by 9.0 mm'),
         'orientations': (put('ImageOrientationPatient', lambda d,k: [0,1,0,0,0,-1] if k<2 else [1,0,0,0,1,0]), 'mixed orientations'),
         'skew': (put('ImageOrientationPatient', [1,0,0,.5,.8,0]), 'right angles'), 'pixel spacing': (put('PixelSpacing', lambda d,k: [.8,.7+.1*(k==3)]), 'several pixel spacings'),
         'no position': (lambda d,k: delattr(d,'ImagePositionPatient') if k==3 else None, 'has no position'), 'one slice': (lambda d,k: k==3, 'one slice'),
         'no spacing': (lambda d,k: delattr(d,'PixelSpacing'), 'has no position')}

@pytest.mark.parametrize('name', TRAPS)
def test_geometry_traps(tmp_path, scan, name, capfd):
    change,words = TRAPS[name]; write_series(scan, tmp_path/'d', change)
    with pytest.raises(GeometryError, match=words) as e: read(tmp_path/'d')
    assert e.value.source==str(tmp_path/'d') and e.value.remedy and not any(capfd.readouterr())
    row = list_series(tmp_path/'d').iloc[0]; assert not row.readable and row.why_not==e.value.fault

FOREIGN = {'MR': dict(Modality='MR'), 'PT': dict(Modality='PT'), 'RTSTRUCT': dict(Modality='RTSTRUCT'), 'SEG': dict(Modality='SEG'), 'localizer': dict(ImageType=['ORIGINAL','PRIMARY','LOCALIZER']),
           'secondary capture': dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.7')}
@pytest.mark.parametrize('name', FOREIGN)
def test_foreign_files_are_named_or_left_out(tmp_path, scan, name):
    write_series(scan, tmp_path/'all', lambda d,k: d.update(FOREIGN[name]))
    with pytest.raises(ReadError, match=name): read(tmp_path/'all')
    write_series(scan, tmp_path/'d'); write_series(chest(seed=9), tmp_path/'d', lambda d,k: d.update(FOREIGN[name]) or k==2, name='odd{k}')
    s = read(tmp_path/'d'); assert np.array_equal(s.voxels, scan.voxels) and name in ' '.join(s.remarks)

def test_damage_stops_the_series(tmp_path, scan):
    good = write_series(scan, tmp_path/'d', name='{k}.dcm'); last = good/'12.dcm'; whole = last.read_bytes()
    for body in (b'', *(whole[:n] for n in range(140,len(whole)-1,97)), whole[:-1], b'text'*100):
        last.write_bytes(body)
        with pytest.raises(ReadError, match='12.dcm|ends early'): read(good)
    last.write_bytes(whole)
    write_series(scan, tmp_path/'rgb', lambda d,k: put('PhotometricInterpretation','MONOCHROME1')(d,k) if k==4 else None)
    with pytest.raises(ReadError, match='MONOCHROME1'): read(tmp_path/'rgb')
    (good/'README').write_text('hello'); shutil.copy(good/'3.dcm', good/'copy of 3.dcm')
    s = read(good); assert np.array_equal(s.voxels, scan.voxels) and 'byte for byte' in ' '.join(s.remarks) and 'not DICOM' in ' '.join(s.remarks)

def test_rescale_per_slice(tmp_path, scan):
    lines = [(1,-1024),(2,-1024),(.5,-1000.5)]
    def change(d, k): d.RescaleSlope,d.RescaleIntercept = lines[k%3]
    v = read(write_series(scan, tmp_path/'d', change)).voxels
    want = np.stack([(scan.voxels[k].astype(float)+1024)*lines[k%3][0]+lines[k%3][1] for k in range(12)])
    assert v.dtype=='f4' and np.array_equal(v, np.maximum(want,-1024))

def test_missing_rescale_needs_air(tmp_path, scan):
    def bare(d, k): del d.RescaleSlope, d.RescaleIntercept
    with pytest.raises(UnitsError): read(write_series(scan, tmp_path/'d', bare))

def test_headers_without_preamble_deflated_and_rle(tmp_path, scan):
    folder = write_series(scan, tmp_path/'a')
    for p in folder.iterdir():
        d = pydicom.dcmread(p); raw = p.read_bytes(); p.write_bytes(raw[132:] if p.name=='IM3' else raw)
    assert np.array_equal(read(folder).voxels, scan.voxels)
    for p in (folder:=write_series(scan, tmp_path/'b')).iterdir():
        d = pydicom.dcmread(p); d.compress(pydicom.uid.RLELossless); d.save_as(p)
    assert np.array_equal(read(folder).voxels, scan.voxels)
    for p in (folder:=write_series(scan, tmp_path/'c')).iterdir():
        d = pydicom.dcmread(p); d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian; d.save_as(p)
    assert np.array_equal(read(folder).voxels, scan.voxels)

@pytest.mark.parametrize('codec', ['JPEG','JPEG2000'])
def test_compressed_by_itk(tmp_path, scan, codec, capfd):
    for k in range(12):
        im = sitk.GetImageFromArray(scan.voxels[k:k+1]); im.SetSpacing((.7,.8,2.5)); im.SetOrigin((0,0,2.5*k))
        for tag,v in {'0008|0060':'CT','0008|0016':'1.2.840.10008.5.1.4.1.1.2','0020|000e':'1.2.3','0028|1052':'-1024','0028|1053':'1','0020|0032':f'0\\0\\{2.5*k}','0020|0037':'1\\0\\0\\0\\1\\0'}.items(): im.SetMetaData(tag, v)
        w = sitk.ImageFileWriter(); w.SetImageIO('GDCMImageIO'); w.KeepOriginalImageUIDOn(); w.UseCompressionOn(); w.SetCompressor(codec); w.SetFileName(str(tmp_path/f'{k}.dcm')); w.Execute(im)
    assert 'JPEG' in pydicom.dcmread(tmp_path/'0.dcm').file_meta.TransferSyntaxUID.name
    capfd.readouterr(); assert np.array_equal(read(tmp_path).voxels, scan.voxels) and not any(capfd.readouterr())
    whole = (tmp_path/'7.dcm').read_bytes(); (tmp_path/'7.dcm').write_bytes(whole[:len(whole)*2//3])
    with pytest.raises(ReadError): read(tmp_path)

def enhanced(scan, path, lines=None, drop=None):
    "The same scan as one multi-frame file, frames in scrambled order"
    folder = write_series(scan, path.parent/'parts'); parts = [pydicom.dcmread(folder/f'IM{k+1}') for k in np.random.default_rng(0).permutation(scan.shape[0]) if k!=drop]
    shutil.rmtree(folder); d = parts[0]; wrap = lambda **tags: Sequence([(lambda g: [setattr(g,k,v) for k,v in tags.items()] and g)(Dataset())])
    group = lambda **parts: (lambda g: [setattr(g,k+'Sequence',v) for k,v in parts.items()] and g)(Dataset())
    shared = group(PlaneOrientation=wrap(ImageOrientationPatient=d.ImageOrientationPatient), PixelMeasures=wrap(PixelSpacing=d.PixelSpacing))
    frames = [group(PlanePosition=wrap(ImagePositionPatient=p.ImagePositionPatient), PixelValueTransformation=wrap(RescaleSlope=(lines or [1]*99)[i], RescaleIntercept=-1024, RescaleType='HU')) for i,p in enumerate(parts)]
    d.PixelData = b''.join(p.PixelData for p in parts); d.NumberOfFrames = len(parts)
    for tag in ('ImagePositionPatient','ImageOrientationPatient','PixelSpacing','RescaleSlope','RescaleIntercept'): delattr(d, tag)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2.1'
    d.SharedFunctionalGroupsSequence,d.PerFrameFunctionalGroupsSequence = Sequence([shared]),Sequence(frames); d.save_as(path); return path

def test_enhanced_multiframe(tmp_path, scan):
    s = read(enhanced(scan, tmp_path/'e.dcm')); assert np.array_equal(s.voxels, scan.voxels); check_same_grid(s, scan)
    with pytest.raises(GeometryError, match='1 missing'): read(enhanced(scan, tmp_path/'g.dcm', drop=5))
    with pytest.raises(UnitsError, match='different rescale'): read(enhanced(scan, tmp_path/'f.dcm', lines=[1,2]*6))

def test_oblique_and_coronal_dicom(tmp_path, scan):
    for code,R in (('LPS',spin(7)), ('LIP',np.eye(3)), ('PSL',spin(5,0,1))):
        v,g = reorient(scan.voxels, scan.grid, 'LPS', code); D = R@np.array(g.direction)[::-1,::-1]
        if np.linalg.det(D)<0: D[:,2] *= -1
        s = scan.replace(voxels=np.ascontiguousarray(v), spacing=g.spacing, origin=g.origin, direction=D[::-1,::-1])
        r = read(write_series(s, tmp_path/code)); i = (3,4,5)
        j = np.round(r.grid.to_index(s.grid.to_mm(i))).astype(int)
        assert np.allclose(r.grid.to_index(s.grid.to_mm(i)), j, atol=1e-2) and r.voxels[tuple(j)]==s.voxels[i] and orientation(r.grid)=='LPS'
        m = sitk.ReadImage(str(write_scan(r, tmp_path/f'{code}.nii.gz'))); assert m.GetSize()==s.shape[::-1] and np.allclose(m.GetOrigin(), s.origin[::-1], atol=1e-3)

def test_several_series(tmp_path, scan):
    other = chest(seed=2); write_series(scan, tmp_path/'d'/'a', put('ConvolutionKernel','L')); write_series(other, tmp_path/'d'/'b', put('ConvolutionKernel','B'))
    with pytest.raises(ReadError, match=r"2 CT series found: \[0\].*'L'.*\[1\].*'B'"): read(tmp_path/'d')
    t = list_series(tmp_path/'d'); assert t.readable.all() and list(t.kernel)==['L','B'] and t['shape'][0]==(12,20,24) and t.spacing[0]==(2.5,.8,.7)
    for which,want in ((0,scan),(1,other),('1',other),(t.series_uid[1],other),('kernel B',other),(np.int64(0),scan)): assert np.array_equal(read(tmp_path/'d', series=which).voxels, want.voxels)
    for wrong in (2,-1,'nothing like it','kernel'):
        with pytest.raises(ReadError, match='match series='): read(tmp_path/'d', series=wrong)

def test_dicomdir_is_the_folder(tmp_path, scan):
    write_series(scan, tmp_path/'IMAGES'); (tmp_path/'DICOMDIR').write_bytes(b'anything')
    assert np.array_equal(read(tmp_path/'DICOMDIR').voxels, scan.voxels)

# paths

def test_paths(tmp_path, scan):
    (tmp_path/'empty').mkdir(); (tmp_path/'notes.txt').write_text('x'); (tmp_path/'x.dcm').touch(); (tmp_path/'y.dcm').write_text('no DICOM')
    for name,words in (('none','does not exist'),('empty','empty folder'),('notes.txt','no scan'),('x.dcm','0 bytes|not DICOM'),('y.dcm','not DICOM')):
        with pytest.raises(ReadError, match=words): read(tmp_path/name)
    write(scan, tmp_path/'empty'/'a.nii.gz'); assert read(tmp_path/'empty').scan_id=='a'
    write(scan, tmp_path/'empty'/'b.nii.gz')
    with pytest.raises(ReadError, match='2 volume files'): read(tmp_path/'empty')
    with pytest.raises(TypeError): read(tmp_path/'empty'/'a.nii.gz', patient='x')

# writers

@pytest.mark.parametrize('end', ['.nii','.nii.gz','.mha','.nrrd'])
@pytest.mark.parametrize('code,turn', [('LPS',np.eye(3)),('RAS',np.eye(3)),('LAS',np.eye(3)),('LIP',np.eye(3)),('RAS',spin(12)),('PIR',spin(4,0,1))])
def test_written_on_the_files_own_grid(tmp_path, scan, end, code, turn):
    src = sitk.ReadImage(str(write(scan, tmp_path/f'x{end}', code, turn))); s = read(tmp_path/f'x{end}'); m = s.voxels>200
    for im,want in ((write_scan(s, tmp_path/f's{end}'), sitk.GetArrayFromImage(src)), (write_mask(m, s, tmp_path/f'm{end}'), sitk.GetArrayFromImage(src)>200)):
        im = sitk.ReadImage(str(im)); tol = 1e-4
        assert im.GetSize()==src.GetSize() and np.array_equal(sitk.GetArrayFromImage(im), want)
        for f in ('GetSpacing','GetOrigin','GetDirection'): assert np.allclose(getattr(im,f)(), getattr(src,f)(), atol=tol), f
    assert np.array_equal(read_mask(tmp_path/f'm{end}', s), m) and np.array_equal(read(tmp_path/f's{end}').voxels, s.voxels)

def test_writers_refuse(tmp_path, scan, monkeypatch):
    m = scan.voxels>0; p = write_mask(m, scan, tmp_path/'new'/'m.nii.gz'); old = p.read_bytes()
    with pytest.raises(DataError, match='exists already'): write_mask(~m, scan, p)
    with pytest.raises(GeometryError, match='shape'): write_mask(m[:-1], scan, tmp_path/'n.nii.gz')
    with pytest.raises(GeometryError): write_map(Map(m*.5, scan.replace(origin=(0,0,0)).grid), scan, tmp_path/'n.nii.gz')
    with pytest.raises(VoxelError, match='labels'): write_mask(m*.5, scan, tmp_path/'n.nii.gz')
    with pytest.raises(VoxelError, match='labels'): write_mask(m*300, scan, tmp_path/'n.nii.gz')
    with pytest.raises(DataError, match='ending'): write_mask(m, scan, tmp_path/'n.png')
    def full(*a): Path(a[1]).write_bytes(b'half'); raise RuntimeError('no space left on device')
    monkeypatch.setattr(sitk, 'WriteImage', full)
    with pytest.raises(DataError, match='no space left'): write_mask(~m, scan, p, overwrite=True)
    assert p.read_bytes()==old and [f.name for f in p.parent.iterdir()]==['m.nii.gz'] and not (tmp_path/'n.nii.gz').exists()
    monkeypatch.undo(); write_mask(~m, scan, p, overwrite=True); assert np.array_equal(read_mask(p, scan), ~m)

def test_map_and_labels(tmp_path, scan):
    v = np.random.default_rng(0).random(scan.shape).astype('f4'); p = write_map(Map(v, scan.grid), scan.replace(stored_as='RAS'), tmp_path/'h.nii.gz')
    im = sitk.ReadImage(str(p)); assert im.GetPixelIDTypeAsString()=='32-bit float' and np.array_equal(sitk.GetArrayFromImage(im), v[:,::-1,::-1])
    lobes = np.random.default_rng(0).integers(0, 6, scan.shape); assert np.array_equal(read_mask(write_mask(lobes, scan, tmp_path/'l.nii.gz')), lobes)
    with pytest.raises(VoxelError, match='labels'): read_mask(p)
    with pytest.raises(GeometryError, match='voxels apart'): read_mask(tmp_path/'l.nii.gz', scan.replace(origin=(0,0,0)))
    assert not read_mask(write_mask(lobes>9, scan, tmp_path/'none.nii.gz'), scan).any()

# real data

@pytest.mark.data
def test_two_kernels_voxel_for_voxel(data_dir):
    for k,folder in dict(L='A0001_lungkernel_L', B='A0001_softkernel_B').items():
        s = read(data_dir/'tcia_lung_pet_ct_dx'/folder)
        assert s.shape==(64,512,512) and np.allclose(s.spacing, (5,.841796875,.841796875)) and s.units=='HU' and s.voxels.dtype=='i2'
        ds = sorted(map(pydicom.dcmread, (data_dir/'tcia_lung_pet_ct_dx'/folder).glob('*.dcm')), key=lambda d: d.ImagePositionPatient[2])
        want = np.stack([d.pixel_array.astype('i4')*int(d.RescaleSlope)+int(d.RescaleIntercept) for d in ds])
        assert np.array_equal(s.voxels, want) and np.allclose(s.origin[::-1], ds[0].ImagePositionPatient) and -1010<np.median(s.voxels[s.voxels<-950])<-960
    both = data_dir/'tcia_lung_pet_ct_dx'; assert list(list_series(both)[:2].kernel)==['L','B']
    with pytest.raises(ReadError, match='2 CT series'): read(both)
    assert read(both, series='kernel B').scan_id==read(both/'A0001_softkernel_B').scan_id

@pytest.mark.data
def test_real_volumes_equal_nibabel(data_dir):
    nib = pytest.importorskip('nibabel')
    p = data_dir/'totalsegmentator'/'example_ct.nii.gz'; s = read(p); im = nib.as_closest_canonical(nib.load(p))
    want = np.asarray(im.dataobj).transpose(2,1,0)[:,::-1,::-1]; assert np.array_equal(s.voxels, np.maximum(want,-1024))
    a,b = read(data_dir/'cip_small_chest'/'ct-64.nrrd'),read(data_dir/'cip_small_chest'/'ct-64Dicom')
    assert np.array_equal(a.voxels, b.voxels) and np.allclose(a.spacing, b.spacing, atol=1e-3)
    assert read_mask(data_dir/'cip_small_chest'/'wholeLung-64.nrrd', a).any()

ODD = {'dcm_qa_ct/GE_tilt_head': (GeometryError,'tilted by 18.5'), 'dcm_qa_ct/Philips_localizer': (ReadError,'localizer'), 'dicom2nifti_failing/gantrytilting': (GeometryError,'tilted by 14.0'),
       'dicom2nifti_failing/notavolume': (GeometryError,'where another'), 'dicom2nifti_failing/sliceincrement': (GeometryError,'1 missing'), 'dicom2nifti_failing/sliceorientation': (ReadError,'modality MR'),
       'dicom2nifti_compressed_mr': (ReadError,'modality MR'), 'pydicom/rtstruct.dcm': (ReadError,'RTSTRUCT'), 'pydicom/rtplan.dcm': (ReadError,'RTPLAN'), 'pydicom/liver_1frame.dcm': (ReadError,'SEG'),
       'pydicom/no_meta.dcm': (ReadError,'not DICOM'), 'pydicom/CT_small.dcm': (GeometryError,'one slice'), 'pydicom/dicomdirtests/DICOMDIR': (ReadError,'CT series found'), 'pydicom': (ReadError,'CT series found')}
@pytest.mark.data
@pytest.mark.parametrize('name', ODD)
def test_odd_dicom(data_dir, name, capfd):
    kind,words = ODD[name]; capfd.readouterr()
    with pytest.raises(kind, match=words): read(data_dir/'odd_dicom'/name)
    assert not any(capfd.readouterr())

@pytest.mark.data
def test_every_real_path_answers(data_dir, capfd):
    "No path under the data raises anything but a DataError, and nothing is printed"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for p in [q for q in sorted(data_dir.rglob('*')) if q.is_dir() or q.parent.name=='pydicom']:
            try: read(p)
            except DataError as e: assert e.remedy and e.source
    assert not any(capfd.readouterr())
